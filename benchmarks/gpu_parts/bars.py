"""The demands on one H200, met or not met, from the rows of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_parts.calls import OURS
from gpu_parts.cases_losses import GEMMS, MAIN_GRAD
from gpu_parts.rows import Row

COMPILED, LIGER, FLASH = "torch.compile", "liger", "SDPA flash"
NOISE = 0.01
"""Two medians of one kernel may differ by this much: a demand of "not slower" forgives it, and says so."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One demand."""

    what: str
    demanded: str
    measured: str
    """Empty: there is no measurement."""
    is_met: bool | None

    @property
    def word(self) -> str:
        """met, NOT MET or not measured."""
        return "not measured" if self.is_met is None else "met" if self.is_met else "NOT MET"


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Every demand; timed rows with status ok count."""
    good = [each for each in rows if each.get("status") == "ok" and each.get("section") != "check"]
    ops = [*_shares(good), *_adamw(good), *_head(good), *_attention(good)]
    return [*ops, *_decode(good), *_peers(good), *_training(good)]


def _decode(rows: Sequence[Row]) -> Iterator[Verdict]:
    """The best of the contenders at each batch, of the peak memory bandwidth."""
    for batch in (1, 8, 32):
        own = [e for e in rows if e.get("section") == "decode" and str(e["case"]).endswith(f"batch {batch}")]
        shares = [share for e in own if (share := _number(e, "of_ceiling")) is not None]
        best = max(shares, default=None)
        yield Verdict(
            what=f"decode, batch {batch}", demanded=">= 60 % of memory bandwidth",
            measured="" if best is None else f"{100 * best:.1f} %", is_met=None if best is None else best >= 0.6,
        )  # fmt: skip


def time_us(each: Row) -> float | None:
    """Microseconds: of graph replay where there is one, else eager."""
    return _number(each, "graph_us") or _number(each, "eager_us")


def show(verdicts: Sequence[Verdict]) -> str:
    """A table."""
    cells = [("demand", "bar", "measured", "verdict")]
    cells += [(v.what, v.demanded, v.measured or "-", v.word) for v in verdicts]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in cells)


def _number(each: Row, name: str) -> float | None:
    value = each.get(name)
    return None if value in (None, "") else float(value)  # type: ignore[arg-type]


def _find(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [each for each in rows if all(str(each.get(k, "")) == str(v) for k, v in wanted.items())]


# (what, op, case begins with, direction, share of the copy bandwidth)
_SHARES = (
    ("RMSNorm forward", "rms_norm", "H ", "fwd", 0.88),
    ("RMSNorm backward", "rms_norm", "H ", "bwd", 0.80),
    ("RoPE in place", "rope", "heads", "fwd", 0.82),
    ("SwiGLU forward", "activation", "silu", "fwd", 0.92),
    ("SwiGLU backward", "activation", "silu", "bwd", 0.85),
    ("cross-entropy, loss and gradient", "cross_entropy", "V ", "both", 0.80),
    ("AdamW", "adamw", "fp32", "step", 0.88),
)


def _shares(rows: Sequence[Row]) -> Iterator[Verdict]:
    for what, op, case, direction, share in _SHARES:
        found = [e for e in _find(rows, op=op, contender=OURS, direction=direction) if str(e["case"]).startswith(case)]
        found = [e for e in found if _number(e, "of_ceiling") is not None and not str(e["case"]).endswith(" add")]
        demanded = f">= {100 * share:.0f} % of copy"
        if not found:
            yield Verdict(what=what, demanded=demanded, measured="", is_met=None)
        for each in found:
            reached = _number(each, "of_ceiling") or 0.0
            measured = f"{100 * reached:.1f} % ({time_us(each):.1f} us)"
            yield Verdict(what=f"{what}, {each['case']}", demanded=demanded, measured=measured, is_met=reached >= share)


def _adamw(rows: Sequence[Row]) -> Iterator[Verdict]:
    found = [e for e in _find(rows, op="adamw", contender=OURS) if _number(e, "launches") is not None]
    for each in found:
        count = int(_number(each, "launches") or 0)
        what = f"AdamW launches, {each['case']}"
        yield Verdict(what=what, demanded="<= 3", measured=str(count), is_met=count <= 3)
    if not found:
        yield Verdict(what="AdamW launches", demanded="<= 3", measured="", is_met=None)


def _head(rows: Sequence[Row]) -> Iterator[Verdict]:
    floor = _find(rows, op="linear_cross_entropy", contender=GEMMS, direction="both")
    for name in (MAIN_GRAD, OURS):
        found = _find(rows, op="linear_cross_entropy", contender=name, direction="both")
        ratio = memory = None
        if found and floor:
            ratio = (time_us(found[-1]) or 0.0) / (time_us(floor[-1]) or 1.0)
        if found:
            memory = (_number(found[-1], "peak_mib") or 0.0) * 2**20 / 1e9
        yield Verdict(
            what=f"linear + CE time ({name})", demanded="<= 1.12 x three GEMMs",
            measured="" if ratio is None else f"{ratio:.3f} x", is_met=None if ratio is None else ratio <= 1.12,
        )
        yield Verdict(
            what=f"linear + CE extra memory ({name})", demanded="<= 2 GB",
            measured="" if memory is None else f"{memory:.2f} GB", is_met=None if memory is None else memory <= 2.0,
        )  # fmt: skip


def _attention(rows: Sequence[Row]) -> Iterator[Verdict]:
    for direction, bar in (("fwd", 600.0), ("bwd", 480.0)):
        found = _find(rows, op="attention", case="D 128 S 8192", contender=OURS, direction=direction)
        rate = _number(found[-1], "tflop_per_s") if found else None
        measured = "" if rate is None else f"{rate:.0f} TFLOP/s"
        what = f"attention D 128 causal S 8192 {direction}"
        yield Verdict(
            what=what, demanded=f">= {bar:.0f} TFLOP/s", measured=measured, is_met=None if rate is None else rate >= bar
        )
    yield from _never_slower(rows, "attention not slower than SDPA flash", {"attention"}, FLASH)


def _peers(rows: Sequence[Row]) -> Iterator[Verdict]:
    ops = {"rms_norm", "layer_norm", "rope", "activation", "cross_entropy", "linear_cross_entropy"}
    for peer in (COMPILED, LIGER):
        yield from _never_slower(rows, f"nothing slower than {peer}", ops, peer)


def _never_slower(rows: Sequence[Row], what: str, ops: set[str], peer: str) -> Iterator[Verdict]:
    """For each direction on its own: ours / the peer's time in every case, the worst of them named."""
    demanded = f"<= 1 x (noise {100 * NOISE:.0f} %)"
    for direction in ("fwd", "bwd", "both"):
        ratios: list[tuple[float, str]] = []
        for ours in _find(rows, contender=OURS, direction=direction):
            if ours.get("op") not in ops:
                continue
            same = {name: ours.get(name, "") for name in ("section", "op", "case", "direction")}
            name = f"{same['op']} {same['case']}"
            ratios += [(_ratio(ours, other), name) for other in _find(rows, contender=peer, **same)]
        slower = sum(ratio > 1 + NOISE for ratio, _ in ratios)
        close = sum(1 < ratio <= 1 + NOISE for ratio, _ in ratios)
        measured = ""
        if ratios:
            worst, where = max(ratios)
            within = f", {close} within noise" if close else ""
            measured = f"{slower} of {len(ratios)} slower{within}; worst {worst:.3f} x ({where})"
        is_met = slower == 0 if ratios else None
        yield Verdict(what=f"{what}, {direction}", demanded=demanded, measured=measured, is_met=is_met)


def _ratio(ours: Row, other: Row) -> float:
    """Ours / the other's time: of graph replay where both have it, else both eager."""
    both = [_number(ours, "graph_us"), _number(other, "graph_us")]
    name = "graph_us" if all(both) else "eager_us"
    return (_number(ours, name) or 0.0) / (_number(other, name) or 1.0)


def _training(rows: Sequence[Row]) -> Iterator[Verdict]:
    steps = [each for each in rows if each.get("op") == "train_step" and _number(each, "tokens_per_s")]
    ours = _find(steps, contender="megallm triton")
    if not ours:
        yield Verdict(what="training step MFU", demanded=">= 50 %", measured="", is_met=None)
        yield Verdict(what="training step beside the best peer", demanded=">= 1.15 x", measured="", is_met=None)
    for each in ours:
        mfu = _number(each, "mfu")
        measured = "" if mfu is None else f"{100 * mfu:.1f} %"
        what = f"training step MFU, {each['case']}"
        yield Verdict(what=what, demanded=">= 50 %", measured=measured, is_met=None if mfu is None else mfu >= 0.5)
        peers = [e for e in _find(steps, case=each["case"]) if not str(e["contender"]).startswith("megallm")]
        if peers:
            best = max(peers, key=lambda e: _number(e, "tokens_per_s") or 0.0)
            ratio = (_number(each, "tokens_per_s") or 0.0) / (_number(best, "tokens_per_s") or 1.0)
            measured = f"{ratio:.2f} x {best['contender']}"
        else:
            ratio, measured = None, ""
        yield Verdict(
            what=f"training step tokens/s, {each['case']}", demanded=">= 1.15 x the best peer", measured=measured,
            is_met=None if ratio is None else ratio >= 1.15,
        )  # fmt: skip
