"""Fine-tuning on one CPU beside TRL's trainers, in one run: `make bench-finetune`.

As cpu.py, with its flags and turns: supervised fine-tuning (rows padded, and packed), a reward model, and DPO with the
reference's log-probabilities computed beforehand. Both sides have the same weights, and in every step the same rows of
the same tokens in the same order, so that their first losses must agree; each pads its batches in its own way.

The rows have the lengths of real data: question and answer pairs (`--data`, JSONL with question and answer), or what is
embedded in megallm. Where data hold no comparison, an answer is compared with another question's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cpu import HERE, SMALL, Pair, append, compare, flags, machine, peers_python

from megallm.data.conversation import Conversation, Message, Preference
from megallm.data.convert import INPUT_HEADING
from megallm.data.embedded import embedded_instructions, embedded_preferences
from megallm.data.examples import comparison_groups, conversation_examples
from megallm.data.finetune import SftDataset
from megallm.data.masks import Example
from megallm.data.tokenizer import Tokenizer, train_bpe

PAD = "<|pad|>"
NUM_ROWS, NUM_COMPARISONS = 1024, 512
"""More than a run sees."""
UNPACKED = SMALL | {"seq": 512, "micro_batch": 4, "microbatches": 4}
PACKED = UNPACKED | {"micro_batch": 1}
"""TRL lays the rows of a microbatch end to end and masks one document from the others, so one row at a time is best."""
PAIRED = UNPACKED | {"micro_batch": 2}
PAIRS = tuple(
    Pair(name=name, ours="ours_finetune", peer="trl_trainers", shape=shape, layout={"kind": kind})
    for name, kind, shape in (
        ("sft, padded", "sft", UNPACKED),
        ("sft, packed", "packed", PACKED),
        ("reward", "reward", PAIRED),
        ("dpo, precomputed reference", "dpo", PAIRED),
    )
)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """(prompt, answer) of each row, (prompt, better, worse) of each comparison."""

    rows: Sequence[tuple[str, str]]
    comparisons: Sequence[tuple[str, str, str]]
    source: str


def main() -> int:
    """Makes rows and weights, runs the pairs, appends to a CSV file."""
    parser = flags(__doc__, out="finetune.csv", rounds=15, steps=2, disturbed=0.05)
    parser.add_argument("--data", type=Path, help="JSONL with question and answer; left out = what is embedded")
    args = parser.parse_args()
    python = peers_python(args.peers_python, Path(args.peers_dir))
    with tempfile.TemporaryDirectory(prefix="bench-finetune-") as folder:
        root = Path(folder)
        texts = read(args.data)
        tokenizer = train_bpe([text for row in texts.rows for text in row], UNPACKED["vocab"] - 1)
        tokenizer = tokenizer.with_control_tokens([PAD])
        (root / "weights").mkdir()
        tokenizer.save(root / "weights")
        tokens = write_rows(texts, tokenizer, root)
        save = [python, str(HERE / "peers" / "trl_trainers.py"), "--shape", json.dumps(UNPACKED), "--save"]
        subprocess.run([*save, str(root / "weights")], check=True)
        return run(args, python, root, tokens, texts.source)


def run(args: argparse.Namespace, python: str, root: Path, tokens: dict[str, float], source: str) -> int:
    """Runs the pairs that are asked for, prints a table, appends rows. `tokens`: a step's, by kind."""
    about = machine()
    print(f"{'what':28} {'ours':>22} {'TRL':>22}   ratio of times (20th - 80th percentile)", flush=True)
    for pair in PAIRS:
        if args.only not in f"{pair.name} {pair.peer}":
            continue
        kind = str(pair.layout["kind"])
        row = compare(
            replace(pair, layout=pair.layout | {"rows": str(root / f"{kind}.json")}), peers_python=python,
            rounds=args.rounds, steps=args.steps, weights=str(root / "weights"), disturbed=args.disturbed,
            limit_s=args.limit_s,
        )  # fmt: skip
        speeds = {side: round(tokens[kind] / float(str(row[f"{side}_ms"])) * 1e3) for side in ("ours", "peer")}
        extra = {"tokens_per_step": round(tokens[kind]), "data": source}
        extra |= {f"{side}_tokens_per_s": speed for side, speed in speeds.items()}
        append(Path(args.out), [row | extra | about])
        cells = [f"{row[f'{side}_ms']:>6} ms {speeds[side]:>6} tok/s" for side in ("ours", "peer")]
        print(
            f"{pair.name:28} {cells[0]:>22} {cells[1]:>22}   {row['ratio_p50']:.3f} ({row['ratio_p20']:.3f} - "
            f"{row['ratio_p80']:.3f}), {row['rounds']} rounds, first losses {row['first_losses_apart']} apart",
            flush=True,
        )
    return 0


def read(data: Path | None) -> Texts:
    """The texts of a file, or those embedded."""
    if data is None:
        instructions = embedded_instructions()[:NUM_ROWS]
        rows = [(f"{each['instruction']}{INPUT_HEADING}{each['input']}\n", each["output"]) for each in instructions]
        compared = embedded_preferences()[:NUM_COMPARISONS]
        comparisons = [(f"{each['prompt']}\n", each["chosen"], each["rejected"]) for each in compared]
        return Texts(rows=rows, comparisons=comparisons, source="embedded")
    records = [json.loads(line) for line in itertools.islice(data.open(encoding="utf-8"), NUM_ROWS + 1)]
    rows = [(f"{record['question']}\n", record["answer"]) for record in records]
    comparisons = [(*row, other[1]) for row, other in itertools.pairwise(rows) if row[1] != other[1]]
    return Texts(rows=rows[:NUM_ROWS], comparisons=comparisons[:NUM_COMPARISONS], source=data.stem)


def write_rows(texts: Texts, tokenizer: Tokenizer, root: Path) -> dict[str, float]:
    """Writes KIND.json for the workers: rows, and which of them each sample has. Returns tokens a step, on average and
    without padding, by kind."""
    made = [Conversation((Message("user", prompt), Message("assistant", answer))) for prompt, answer in texts.rows]
    length = UNPACKED["seq"]
    examples, _ = conversation_examples(made, tokenizer, None, max_length=length)
    preferences = [
        Preference((Message("user", prompt),), (Message("assistant", better),), (Message("assistant", worse),))
        for prompt, better, worse in texts.comparisons
    ]
    groups, _ = comparison_groups(preferences, tokenizer, None, max_length=length)
    rows = [plain(example) for example in examples]
    answers = [plain(example) for group in groups for example in group.examples]
    packs = SftDataset(examples, seq_length=length, pack=True)
    planned = [packs.members(index) for index in range(packs.num_samples)]
    tokens = {}
    for kind, own, samples, shape in (
        ("sft", rows, [[place] for place in range(len(rows))], UNPACKED),
        ("packed", rows, planned, PACKED),
        ("reward", answers, [[2 * place, 2 * place + 1] for place in range(len(groups))], PAIRED),
        ("dpo", answers, [[2 * place, 2 * place + 1] for place in range(len(groups))], PAIRED),
    ):
        (root / f"{kind}.json").write_text(json.dumps({"rows": own, "samples": samples}))
        per_sample = sum(len(own[place][0]) for sample in samples for place in sample) / len(samples)
        tokens[kind] = per_sample * shape["micro_batch"] * shape["microbatches"]
    return tokens


def plain(example: Example) -> tuple[list[int], int]:
    """(ids, where what is trained begins)."""
    return example.input_ids.tolist(), max(example.prompt_length, 1)


if __name__ == "__main__":
    sys.exit(main())
