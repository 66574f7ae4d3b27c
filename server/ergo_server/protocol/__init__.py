"""What is said to the model, and what it says back. No I/O."""
