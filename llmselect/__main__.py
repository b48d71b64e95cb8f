"""`python -m llmselect`, and the module that `accelerate launch -m llmselect` starts in every process."""

from __future__ import annotations

from llmselect.cli import main

if __name__ == "__main__":
    main()
