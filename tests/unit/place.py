"""A folder with the quick start's data and model folder, to spoil: for tests of what is refused."""

from __future__ import annotations

from pathlib import Path

from launch import ROOT

EXAMPLES = ROOT / "examples" / "quickstart"
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
TORCHRUN += ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE")


class Place:
    """A folder with the quick start's data and model folder, and command lines that name them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.model = folder, folder / "data", folder / "model"

    def words(self, module: str, *more: object) -> list[str]:
        """A command line that passes every check, and then `more`."""
        rows = self.data / ("train.jsonl" if module == "train" else "sft.jsonl")
        words = [
            EXAMPLES / ("dgpo.toml" if module == "train" else "sft.toml"),
            "--run.folder",
            self.folder / "run",
        ]
        words += ["--model.path", self.model, "--model.init", "random", "--data.train", f'["{rows}"]']
        words += ["--parallel.tensor_model_parallel_size", 1, "--evaluation.data", "[]", *more]
        return [str(word).replace("{folder}", str(self.folder)) for word in words]
