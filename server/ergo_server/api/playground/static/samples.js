// Scenes that the embedded model has never seen in training; docs/samples.py draws them.

export const SAMPLES = [
  { name: "scene", question: "What is the code on the red circle?", width: 2000, height: 2000 },
  { name: "scene-landscape", question: "What is the code on the green triangle?", width: 3000, height: 2000 },
  { name: "scene-portrait", question: "Which code is on the orange circle?", width: 2000, height: 3000 },
  { name: "scene-panorama", question: "What number is on the red triangle?", width: 4800, height: 2000 },
].map((sample) => ({ ...sample, path: `/static/${sample.name}.jpg`, small: `/static/${sample.name}-small.jpg` }));
