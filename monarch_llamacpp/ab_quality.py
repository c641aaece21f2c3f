"""Quality of every arm against one shared reference: stock with f16 K and V, without flash attention."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path

import sacrebleu

from . import ab_quality_child
from .ab_arms import STOCK, Arm, stock_arm
from .ab_child import Report, check_activity, run_child
from .ab_lab import Lab
from .ab_plan import make_plan
from .ab_receipt import describe_arm
from .ab_rows import Row
from .errors import MonarchError
from .hashes import hash_value


def run_quality(lab: Lab) -> None:
    with tempfile.TemporaryDirectory(prefix="monarch-ab-") as name:
        folder = Path(name)
        try:
            plan = make_plan(lab.settings, folder / "plan.json")
            jobs = _jobs(lab, plan)
            part = lab.part("quality", len(jobs) + 1)
            if jobs:
                part.next("reference")
                reference = _run(lab, stock_arm(), 0, folder, is_reference=True)
        except MonarchError as error:
            lab.report_failure(STOCK, "quality", f"quality needs stock as the reference: {error}")
            return
        for arm, flash_attn, receipt in jobs:
            part.next("stock again, as a control" if (arm.name, flash_attn) == (STOCK, 0) else arm.name)
            if arm.name == STOCK or arm in lab.arms:
                with lab.attempt(arm, "quality"):
                    report = _run(lab, arm, flash_attn, folder)
                    lab.rows.put(_rows(arm, flash_attn, report, reference, plan, receipt))


def _jobs(lab: Lab, plan: Report) -> list[tuple[Arm, int, str]]:
    """What an earlier run has not done; first stock against itself: what the yardstick is good for."""
    arms = [stock_arm(), *(arm for arm in lab.arms if arm.name != STOCK)]
    facts = {"plan": hash_value(plan), "reference": describe_arm(arms[0])}
    jobs = []
    for arm in arms:
        taken, receipt = lab.take("quality", arm, **facts)
        done = {row["flash_attn"] for row in taken}
        jobs += [(arm, flash_attn, receipt) for flash_attn in arm.flash_attn if flash_attn not in done]
    return jobs


def _rows(arm: Arm, flash_attn: int, report: Report, reference: Report, plan: Report, receipt: str) -> list[Row]:
    for run, stats in report["stats"].items():
        check_activity(arm, stats, plan["n_ubatch"] if run == "prefill" else 1)
    head = {"row": "quality", "arm": arm.name, "flash_attn": flash_attn, "type_kv": arm.type_kv, "receipt": receipt}
    head |= {"knobs": arm.knob_values, "control": (arm.name, flash_attn) == (STOCK, 0)}
    rows = [*_text_rows(report, plan), *_recall_rows(report, plan), *_continuation_rows(report, reference, plan)]
    return [head | row for row in rows]


def _run(lab: Lab, arm: Arm, flash_attn: int, folder: Path, is_reference: bool = False) -> Report:
    args = [lab.settings.model, "--plan", folder / "plan.json", "--reference", folder]
    args += ["--is-reference"] if is_reference else []
    return run_child(arm, ab_quality_child.__name__, args, flash_attn, lab.settings)


def _text_rows(report: Report, plan: Report) -> list[Row]:
    rows = []
    for way in ab_quality_child.WAYS:
        values = dict(report[way])
        held = {name: values.pop(name) for name in ("attended", "bytes_per_token", "bytes_per_further_token")}
        held |= {"way": way, "n_chunks": len(plan["chunks"]), "n_tokens": len(plan["chunks"][0])}
        held |= {"n_ubatch": plan["n_ubatch"] if way == "prefill" else 1}
        held |= {"n_scored": plan["n_scored"] if way == "prefill" else plan["n_decode"]}
        held |= {"stats": report["stats"][way]}
        rows += [{"metric": metric, "value": value, **held} for metric, value in values.items()]
    return rows


def _recall_rows(report: Report, plan: Report) -> list[Row]:
    """One for each length and depth."""
    cells: dict[tuple[int, float], list[bool]] = defaultdict(list)
    for haystack, found in zip(plan["haystacks"], report["found"], strict=True):
        for question, right in zip(haystack["questions"], found, strict=True):
            cells[haystack["length"], round(question["depth"], 2)].append(right)
    rows = []
    for (length, depth), found in sorted(cells.items()):
        counts = {"value": sum(found) / len(found), "n_found": sum(found), "n_needles": len(found)}
        place = {"length": length, "depth": depth, "n_ubatch": plan["n_ubatch"]}
        rows.append({"metric": "needle_recall", **place, **counts})
    return rows


def _continuation_rows(report: Report, reference: Report, plan: Report) -> list[Row]:
    pairs = list(zip(report["written"], reference["written"], strict=True))
    held = {"n_continuations": len(pairs), "n_tokens": plan["n_continue"]}
    bleu = sacrebleu.corpus_bleu(report["texts"], [reference["texts"]]).score
    exact = sum(ours == theirs for ours, theirs in pairs) / len(pairs)
    rows = [{"metric": "bleu", "value": bleu, **held}, {"metric": "exact_match", "value": exact, **held}]
    if mass := report["mass"]:
        mean = sum(map(sum, mass)) / len(mass)
        rows.append({"metric": "cold_attention", "value": mean, "promoted_sticky": mass, **held})
    return rows
