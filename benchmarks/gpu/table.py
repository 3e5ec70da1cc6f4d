"""What is printed last: what was checked, and the asked numbers beside the measured ones."""

from __future__ import annotations

from typing import Any

Parts = dict[str, dict[str, Any]]


def render(facts: dict[str, Any], parts: Parts, names: list[str]) -> str:
    lines = [
        f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {str(facts['commit'])[:12]}, "
        f"sources {facts['source']}",
        "",
    ]
    if facts["device"].startswith("CPU"):
        lines[1:1] = ["A dry run: it shows that the suite runs. None of its numbers says anything about speed."]
    lines += [f"{'part':32}{'state':>12}{'seconds':>9}  what was found"]
    for name in names:
        part = parts.get(name, {"state": "not run", "why": "no time was left; run the same command again"})
        seconds = f"{part['seconds']:.0f}" if "seconds" in part else ""
        lines.append(f"{name:32}{part['state']:>12}{seconds:>9}  {_found(part)}")
    asked = [row for name in names for r in parts.get(name, {}).get("rows", []) for row in r.get("asked", [])]
    if asked:
        lines += ["", f"{'what':62}{'asked':>8}{'measured':>10}"]
        lines += [_asked(row) for row in asked]
    errors = [
        f"{r.get('case')} {contender}: {t['error']}"
        for name in names
        for r in parts.get(name, {}).get("rows", [])
        for contender, t in r.get("times", {}).items()
        if "error" in t
    ]
    if errors:
        lines += ["", "contenders that did not run:", *(f"  {e}" for e in errors)]
    return "\n".join(lines)


def _found(part: dict[str, Any]) -> str:
    if part.get("why"):
        return str(part["why"]).splitlines()[-1][:150]
    rows = part.get("rows", [])
    cases = sum(r.get("cases", 0) for r in rows)
    if not cases:
        return f"{len(rows)} rows"
    failed = [f for r in rows for f in r["failed"]]
    refused = sum(len(names) for r in rows for names in r["refused"].values())
    text = f"{cases} cases, {len(failed)} wrong" + (f", {refused} refused" if refused else "")
    return text + (f"; first: {failed[0][:150]}" if failed else "")


def _asked(row: dict[str, Any]) -> str:
    measured, share = row["measured"], row["unit"].startswith("of ")
    if measured is None or measured in (float("inf"), 0.0):
        said = "-"
    else:
        said = f"{100 * measured:.0f} %" if share else f"{measured:.2f}x"
    goal = f"{100 * row['asked']:.0f} %" if share else f"{row['asked']:.2f}x"
    return f"{row['what']:62}{goal:>8}{said:>10}"


def succeeded(parts: Parts) -> bool:
    """Whether everything that ran was right."""
    return not any(p["state"] == "failed" or any(r.get("failed") for r in p.get("rows", [])) for p in parts.values())
