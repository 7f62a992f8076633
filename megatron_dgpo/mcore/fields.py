"""Which fields of Megatron-Core's dataclasses a config may set, known without importing Megatron.

Importing it takes seconds, and a wrong setting should be refused at once. So the fields are read from the
source of the installed Megatron-Core. Where that source is not a plain dataclass, the class itself is
imported and asked.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

_FROM_HF = "the model's config.json"
_WHOLE = "the export of whole parameters after a step"
OWNED_TRANSFORMER_FIELDS = {
    **dict.fromkeys(
        ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
         "ffn_hidden_size", "normalization", "layernorm_epsilon", "gated_linear_unit", "activation_func",
         "add_bias_linear", "add_qkv_bias", "qk_layernorm", "init_method_std"),
        _FROM_HF,
    ),
    **dict.fromkeys(("params_dtype", "pipeline_dtype", "bf16", "fp16"), "model.params_dtype"),
    **dict.fromkeys(
        ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
         "sequence_parallel", "variable_seq_lengths"),
        "the [parallel] section",
    ),
    **dict.fromkeys(("calculate_per_token_loss",), "the loss's global denominators"),
}  # fmt: skip
OWNED_OPTIMIZER_FIELDS = {
    **{name: f"optimizer.{name}" for name in ("lr", "min_lr", "weight_decay", "clip_grad")},
    **{name: f"optimizer.{name}" for name in ("adam_beta1", "adam_beta2", "adam_eps")},
    **dict.fromkeys(("bf16", "fp16", "params_dtype"), "model.params_dtype"),
    "use_distributed_optimizer": "the checkpoint format",
    "overlap_param_gather_with_optimizer_step": _WHOLE,
}
OWNED_DDP_FIELDS = {
    "use_distributed_optimizer": "the checkpoint format",
    "average_in_collective": "the loss's global denominators",
    "overlap_param_gather": _WHOLE,
}


@dataclasses.dataclass(frozen=True)
class PassedThrough:
    """A section of the config whose keys are fields of one of Megatron's dataclasses."""

    section: str
    module: str
    """Where the dataclass is defined."""
    cls: str
    owned: dict[str, str]
    """Fields that users may not set, and what each follows from."""

    def types(self) -> dict[str, str]:
        """Field -> its type as Megatron's source writes it, such as "bool" or "Optional[int]"."""
        return field_types(self.module, self.cls)


PASSED_THROUGH = (
    PassedThrough(
        "model.transformer",
        "megatron.core.transformer.transformer_config",
        "TransformerConfig",
        OWNED_TRANSFORMER_FIELDS,
    ),
    PassedThrough(
        "ddp",
        "megatron.core.distributed.distributed_data_parallel_config",
        "DistributedDataParallelConfig",
        OWNED_DDP_FIELDS,
    ),
    PassedThrough(
        "optimizer.megatron",
        "megatron.core.optimizer.optimizer_config",
        "OptimizerConfig",
        OWNED_OPTIMIZER_FIELDS,
    ),
)


class _NotPlain(Exception):
    """The source alone does not tell the fields."""


@functools.cache
def field_types(module: str, cls: str) -> dict[str, str]:
    """The fields of a dataclass in order, those of its bases first, with their types as text.

    Raises ImportError where the module or the class is not there.
    """
    if module not in sys.modules:
        try:
            return dict(fields_in_source(module, cls))
        except (_NotPlain, OSError, SyntaxError):
            pass  # the class knows
    found = getattr(importlib.import_module(module), cls, None)
    if found is None:
        raise ImportError(f"{module} has no {cls}")
    fields = dataclasses.fields(found)
    return {f.name: f.type if isinstance(f.type, str) else getattr(f.type, "__name__", "") for f in fields}


def _source(module: str) -> Path:
    """The file of a module, found without importing the packages that it is in, as `find_spec` would."""
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    for folder in (spec and spec.submodule_search_locations) or ():
        if parts and Path(folder, parts[0]).is_dir():  # a namespace package may have several folders
            return Path(folder, *parts).with_suffix(".py")
    raise _NotPlain(module)


def fields_in_source(module: str, cls: str) -> Iterator[tuple[str, str]]:
    tree = ast.parse(_source(module).read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls]
    if len(found) != 1 or not _is_plain(found[0]):
        raise _NotPlain(f"{module}.{cls}")
    for base in reversed(found[0].bases):  # a later base's fields come first
        if not isinstance(base, ast.Name):
            raise _NotPlain(f"{module}.{cls}")
        yield from fields_in_source(_where(base.id, tree, module), base.id)
    for node in found[0].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            type_ = ast.unparse(node.annotation)
            if isinstance(node.annotation, ast.Constant) or "ClassVar" in type_ or "InitVar" in type_:
                raise _NotPlain(f"{module}.{cls}.{node.target.id}")
            yield node.target.id, type_


def _is_plain(node: ast.ClassDef) -> bool:
    """@dataclass, or @dataclass(...), and nothing else that could change which fields there are."""
    decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    if [ast.unparse(d) for d in decorators] not in (["dataclass"], ["dataclasses.dataclass"]):
        return False
    simple = (ast.AnnAssign, ast.Expr, ast.FunctionDef, ast.Pass)
    return not node.keywords and all(isinstance(statement, simple) for statement in node.body)


def _where(name: str, tree: ast.Module, module: str) -> str:
    """The module that defines a name which this one uses."""
    if any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body):
        return module
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in [a.asname or a.name for a in node.names]:
            if any(a.asname == name for a in node.names):
                break
            parent = module.split(".")[: -node.level] if node.level else []
            return ".".join([*parent, *([node.module] if node.module else [])])
    raise _NotPlain(f"{module}: {name}")
