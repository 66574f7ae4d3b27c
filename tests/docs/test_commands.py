"""Every command and program that the documents show, run as a reader would: page by page, in their order."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import support
from support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md"]

EVERYWHERE = "http://127.0.0.1:8000"
"""The address in the documents; a free port takes its place."""

ENGINE_PORT = "8001"
"""Likewise."""

NOT_RUN = {
    "make test": "this test is a part of it",
    "make observability-test": "likewise",
    "make attack": "minutes of harm; its own tests are run by `make attack`",
    "make bench": "measures for minutes, and asserts nothing",
    "make bench-images": "likewise",
    "make load": "minutes; tests/load runs each scenario in short",
    "make soak": "likewise",
    "python -m loadtests.load closed --users 1 --users 4 --users 16 --seconds 60 --url http://127.0.0.1:8000": "likewise",
    'python -m loadtests.load poisson --rate 2 --seconds 300 --url http://127.0.0.1:8000 --key "$KEY"': "likewise",
    "python -m loadtests.load compare --url http://127.0.0.1:8000 --engine-url http://my-engine:8001 --seconds 300": "likewise",
    "HF_HUB_OFFLINE=1 vllm bench serve --backend openai-chat --base-url http://127.0.0.1:8000 "
    "--endpoint /v1/chat/completions \\\n"
    "    --model ergo --tokenizer models/ergo_mini/checkpoint --dataset-name custom_image "
    "--dataset-path load-pictures/vllm.jsonl \\\n"
    "    --custom-ensure-client-side-data --num-prompts 20 --request-rate 1 --seed 1 --custom-output-len 64 --temperature 0 \\\n"
    "    --percentile-metrics ttft,e2el --metric-percentiles 50,95,99 --goodput e2el:8000": "is in vLLM's own environment",
    "GUIDELLM__MAX_WORKER_PROCESSES=1 guidellm run --backend kind=openai_http,target=http://127.0.0.1:8000,model=ergo \\\n"
    "    --profile kind=poisson,rate=1 --constraint kind=max_requests,count=12 \\\n"
    "    --data kind=json_file,path=load-pictures/guidellm.json --output kind=json,path=guidellm.json": "not installed here",
    "make train": "hours",
    "make grpo": "minutes; tests/training/test_ablation.py runs what it runs, in short",
    "VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8001 --tensor-parallel-size 2 \\\n"
    '     --max-model-len 16384 --limit-mm-per-prompt \'{"image": 9, "video": 0}\' --enable-prompt-tokens-details '
    "--generation-config vllm": "needs GPUs; tests/training/test_grpo.py has ergo-mini's rollouts written by vLLM",
    "vllm serve Qwen/Qwen2.5-VL-72B-Instruct-AWQ --port 8002 --tensor-parallel-size 2 \\\n"
    '     --max-model-len 16384 --limit-mm-per-prompt \'{"image": 9, "video": 0}\' --generation-config vllm': "likewise",
    "accelerate launch --config_file training/configs/fsdp.yaml -m ergo_train.grpo training/configs/qwen2.5-vl-7b.toml "
    "runs/qwen": "likewise",
    "make evaluate": "minutes; test_training.py runs what it runs",
    "docker build -f docker/gateway.Dockerfile -t registry.example/ergo-vqa-gateway:0.1.0 .": "needs Docker's engine",
    "docker push registry.example/ergo-vqa-gateway:0.1.0": "likewise, and a registry",
    "helm install eyes helm/ergo-vqa --namespace vision --create-namespace --wait --timeout 30m \\\n"
    "    --set gateway.image.repository=registry.example/ergo-vqa-gateway": "needs a cluster; tests/helm renders the chart",
    "helm test eyes --namespace vision --logs": "likewise; tests/helm runs the pod's program",
    "helm install eyes helm/ergo-vqa --namespace vision --values helm/recipes/vllm-router/ergo-vqa.yaml": "likewise",
    "helm install eyes-router helm/recipes/vllm-router --namespace vision --set engines=eyes": "likewise",
    "helm install eyes helm/ergo-vqa --namespace vision --values helm/recipes/llm-d/ergo-vqa.yaml": "likewise",
    "helm install eyes-pool $LLM_D_CHART --version v0.11.0 --namespace vision "
    "--values helm/recipes/llm-d/router.yaml": "needs a cluster, and llm-d",
    "kubectl apply --namespace vision --filename helm/recipes/llm-d/route.yaml": "likewise",
    "helm install stack vllm/vllm-stack --version 0.1.12 --namespace vision "
    "--values helm/recipes/production-stack/values.yaml": "likewise",
    "helm install eyes helm/ergo-vqa --namespace vision --values helm/recipes/production-stack/ergo-vqa.yaml": "likewise",
    "serve deploy helm/recipes/ray-serve/serve.yaml": "needs Ray, and GPUs",
    "helm install eyes helm/ergo-vqa --namespace vision --values helm/recipes/ray-serve/ergo-vqa.yaml": "likewise",
    "vllm bench serve --backend openai-chat --base-url http://my-engine:8001 --endpoint /v1/chat/completions \\\n"
    "    --model nota-ai/ERGO-7B --num-prompts 500 --max-concurrency 32 --random-input-len 200 --random-output-len 1 \\\n"
    "    --dataset-name random-mm --random-mm-bucket-config '{(588, 812, 1): 1.0}'": "needs a GPU",
    "vllm bench serve --backend openai-chat --base-url http://my-engine:8001 --endpoint /v1/chat/completions \\\n"
    "    --model nota-ai/ERGO-7B --num-prompts 500 --max-concurrency 32 --random-input-len 200 --random-output-len 120 \\\n"
    "    --dataset-name random --ignore-eos": "likewise",
    "docker compose build": "needs Docker's engine; tests/deploy builds the image with buildah, and reads the Compose file",
    "docker compose up --detach": "likewise",
    "docker compose logs --follow model engine": "likewise",
    "docker compose run --rm --no-deps --entrypoint head model -n 1 "
    "/models/nota-ai/ERGO-7B/main/.cache/huggingface/download/config.json.metadata": "likewise",
    "docker run --rm ergo-vqa-gateway:0.1.0 keys new me >> secrets/api-keys": "likewise",
    "docker build -f docker/gateway.Dockerfile -t ergo-vqa-gateway .": "likewise",
    "docker run --rm --read-only --tmpfs /tmp --cap-drop ALL --stop-timeout 35 -p 127.0.0.1:8000:8000 \\\n"
    "    -e ERGO_ENGINE=vllm -e ERGO_ENGINE_URL=http://my-engine:8001 ergo-vqa-gateway": "likewise",
    "cp .env.example .env": "belongs to Docker's commands, and would write into the repository",
    "install -d -m 700 secrets": "likewise",
    "install -m 644 /dev/null secrets/hf-token": "likewise",
    "head -c 24 /dev/urandom | base64 > secrets/grafana-password": "likewise",
    "chmod 644 secrets/*": "likewise",
    "docker compose build gateway": "needs Docker's engine",
    "docker compose up --detach --no-deps gateway": "likewise; tests/test_life_cycle.py stops gateways as it does",
    "docker compose restart engine": "likewise; tests/test_life_cycle.py restarts vLLM",
    "install -m 644 ergo-vqa.service /etc/systemd/system/": "would write into the machine",
    "systemctl enable --now ergo-vqa": "needs systemd",
    "systemctl restart vllm": "likewise; tests/test_life_cycle.py restarts vLLM",
    "helm upgrade eyes helm/ergo-vqa --namespace vision --reset-then-reuse-values --set gateway.image.tag=0.2.0": "no cluster",
    "kubectl rollout status --namespace vision deployment/eyes-ergo-vqa-gateway": "likewise",
    "kubectl rollout restart --namespace vision statefulset/eyes-ergo-vqa-engine": "likewise",
}
"""Commands that a reader may give and a test may not, with the reason."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int


def blocks(path: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page; those within a list lose its indentation."""
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", path.read_text(), re.MULTILINE | re.DOTALL):
        indent, language, text = match.groups()
        line = path.read_text()[: match.start()].count("\n") + 1
        yield Block(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE), line)


def commands(text: str) -> list[str]:
    """Split a shell block into commands: a line ends one, but for ``\\``, here documents and quotes that go on."""
    found: list[str] = []
    open_command = ""
    for line in text.splitlines(keepends=True):
        open_command += line
        if not _goes_on(open_command):
            found.append(open_command.rstrip("\n"))
            open_command = ""
    assert not open_command, open_command
    return [command for command in found if command.strip()]


def _goes_on(command: str) -> bool:
    """Say whether bash would wait for more."""
    if here := re.search(r"<<'?(\w+)'?", command):
        return not re.search(rf"^{here[1]}$", command, re.MULTILINE)
    check = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
    return command.endswith("\\\n") or "unexpected EOF" in check.stderr or "end of file" in check.stderr


class Reader:
    """Does what a page says, in a folder of its own that looks like the repository.

    Args:
        folder: where.
        url: a server that runs already; a page that starts one itself uses its own.
        stack: ends what was started.
    """

    def __init__(self, folder: Path, url: str, stack: ExitStack) -> None:
        self.folder = folder
        self.url = url
        self.engine = ""
        """URL of the engine that the page started."""
        self.stack = stack
        self.said = ""
        """What the last command wrote."""
        for entry in ROOT.iterdir():
            if entry.name not in (".git", ".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache"):
                (folder / entry.name).symlink_to(entry)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("ERGO_")} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        }

    def shell(self, text: str) -> None:
        """Run a block in one shell, as a reader would; what starts a server goes on in the background."""
        script = ""
        for command in commands(text):
            plain = command.split("#")[0].strip()
            if plain in NOT_RUN:
                continue
            if re.search(r"(^| )(make run|ergo-vqa serve|vllm serve)\b", plain):
                self.start(plain)
            else:
                script += command + "\n"
        if script:
            self._run(["bash", "-euo", "pipefail", "-c", self._here(script)])

    def python(self, program: str) -> None:
        """Run a program."""
        self._run([sys.executable, "-W", "error", "-c", self._here(program)])

    def start(self, command: str) -> None:
        """Start a server on a free port, and wait until it is ready; vLLM serves ergo-mini here, with the flags of the page."""
        port = support.free_port()
        url, log = f"http://127.0.0.1:{port}", self.folder / f"server-{port}.log"
        if "vllm serve" in command:
            if reason := support.why_no_vllm():
                pytest.skip(reason)
            _, _, model, *flags = shlex.split(command.replace("\\\n", " "))
            assert (model, flags[:2]) == ("nota-ai/ERGO-7B", ["--port", ENGINE_PORT])
            # ergo-mini's context, and a processor's memory; what comes later counts.
            process = support.start_vllm(port, log, *flags[2:], "--max-model-len", "4096")
            self.engine, ready = url, f"{url}/health"
        else:
            command = command.replace("make run", f"make run PORT={port}").replace(f"http://127.0.0.1:{ENGINE_PORT}", self.engine)
            with log.open("wb") as out:
                process = subprocess.Popen(
                    ["bash", "-c", f"exec env {command}"],
                    # Where things would have to be installed first, they must not be installed from the reader's folder.
                    cwd=ROOT if "make run" in command else self.folder,
                    env=self.environment | {"ERGO_PORT": str(port)},
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            self.url, ready = url, f"{url}/readyz"
        self.stack.callback(_end, process)
        # A shell that has put it into the background ends at once, with status 0.
        support.wait_until(lambda: support.answers(ready) or process.poll(), "the server is ready")
        assert not process.poll(), log.read_text()

    def _here(self, text: str) -> str:
        return text.replace(EVERYWHERE, self.url)

    def _run(self, command: list[str]) -> None:
        environment = self.environment | {"ERGO_URL": self.url}
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # in the order in which a terminal shows both
            text=True,
            check=False,
            timeout=600,
        )
        self.said = done.stdout
        assert done.returncode == 0, f"{command[-1]}\n{self.said}"


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # the page may have ended it
        os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)


def masked(text: str) -> list[str]:
    """Return lines whose figures are left out: times differ from run to run, and a pixel's edge between processors."""
    return [re.sub(r"\d+", "0", line).rstrip() for line in text.splitlines() if line.strip()]


SHOWN = {"sh", "python", "text", "json", ""}
"""Languages of blocks: commands, programs, what they wrote, responses, and pictures made of letters."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_says_can_be_done(page: Path, embedded: str, tmp_path: Path) -> None:
    """Every command of a page succeeds and every program runs, against the real server; what the page says was written was,
    but for its figures."""
    with ExitStack() as stack:
        reader = Reader(tmp_path, embedded, stack)
        for block in blocks(page):
            assert block.language in SHOWN, f"{page.name}:{block.line}"
            if block.language == "sh":
                reader.shell(block.text)
            elif block.language == "python":
                reader.python(block.text)
            elif block.language == "text":
                assert masked(reader.said) == masked(block.text), f"{page.name}:{block.line}"
