"""Make a picture of a run in a notebook: ``python docs/pictures/notebook.py FILE.png``, in the root of the repository.

Needs ``pip install nbclient nbconvert ipykernel``, Chromium, and ``runs/demo/base``, which ``make demo`` makes.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

QUIET = """
import warnings
warnings.simplefilter("ignore")
import datasets, transformers
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
"""
CELL = """from datasets import load_dataset
from rlhf import SFTConfig, SFTTrainer

files = {"train": "demo/data/pairs_train.jsonl", "eval": "demo/data/pairs_eval.jsonl"}
rows = load_dataset("json", data_files=files)
args = SFTConfig(
    "runs/notebook", max_steps=60, logging_steps=10, eval_strategy="steps", eval_steps=20,
    max_length=128, per_device_train_batch_size=32, learning_rate=3e-3, save_strategy="no",
)
trainer = SFTTrainer("runs/demo/base", args, train_dataset=rows["train"], eval_dataset=rows["eval"])
trainer.train();"""


def main(picture: Path, kernel: str = "python3") -> None:
    """Run the cell, and make the picture of what is below it."""
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter

    cells = [nbformat.v4.new_code_cell(source) for source in (QUIET, CELL)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=600, kernel_name=kernel).execute()
    del notebook.cells[0]
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "notebook.html")
        page.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
        words = ["--headless", "--no-sandbox", "--window-size=960,570", "--virtual-time-budget=3000"]
        subprocess.run(["chromium", *words, f"--screenshot={picture.resolve()}", page.as_uri()], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
