"""Adapt a trained model: the methods that train a part of it. See methods.py."""

from tinyfm.adapt.methods import (
    METHODS,
    AdapterConfig,
    apply,
    base_hash,
    kinds_of_bias,
    load_adapter,
    merge,
    remove,
    select,
    summary,
    train_only,
    trained,
)

__all__ = [
    "METHODS",
    "AdapterConfig",
    "apply",
    "base_hash",
    "kinds_of_bias",
    "load_adapter",
    "merge",
    "remove",
    "select",
    "summary",
    "train_only",
    "trained",
]
