"""`megallm presets`: the model shapes known by name."""

from __future__ import annotations

import argparse

from megallm.config.presets import get_preset, preset_names
from megallm.model.counts import parameter_counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> int:
    """Prints one line a preset."""
    print(f"{'name':18} {'parameters':>12} {'layers':>6} {'hidden':>6} {'heads':>5} {'kv':>4} {'vocabulary':>10}")
    for name in preset_names():
        c = get_preset(name)
        size = f"{parameter_counts(c).total / 1e6:,.1f}M"
        print(
            f"{name:18} {size:>12} {c.num_hidden_layers:6} {c.hidden_size:6} {c.num_attention_heads:5} "
            f"{c.num_key_value_heads:4} {c.vocab_size:10}"
        )
    return 0
