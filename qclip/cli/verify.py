"""`qclip verify`: may this artifact replace its model? Exit 0 where every requirement is met, 1 where one is not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common, comparison
from .process import FAILED

if TYPE_CHECKING:
    from qclip.verification import Outcome

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "qclip verify photos-w8a8 --against photos --data folder:pictures --require 'top1>=-0.5, ece<=+1'\n\n"
    "qclip verify my-w4a8 --against my.safetensors --data folder:unlabelled "
    "--require 'index_recall@10>=0.98, text_recall@10>=0.98' --texts queries.txt\n\n"
    "qclip verify my-w4a8 --against my.safetensors --data folder:unlabelled --require 'cosine_mean>=0.99' --bisect"
)


def command(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="Folder that `qclip quantize` wrote.")],
    against: Annotated[
        str, typer.Option("--against", metavar="MODEL", help="The model that it was made from, or another of its kind.")
    ],
    data: Annotated[
        list[str], typer.Option("--data", metavar="DATA", help="Images, with labels or without, KIND:PATH; repeatable.")
    ],
    require: Annotated[
        list[str],
        typer.Option(
            "--require",
            metavar="LIST",
            help="METRIC>=BOUND or METRIC<=BOUND, by commas. With a sign: the difference to MODEL, of shares in "
            "percentage points; without: the value. METRIC(NAME): of one set, score, corruption or group. Repeatable.",
        ),
    ],
    ood: Annotated[
        list[str] | None, typer.Option("--ood", metavar="DATA", help="Other classes, for auroc and fpr95; repeatable.")
    ] = None,
    dev: common.Dev = None,
    train: common.Train = None,
    negatives: common.Negatives = None,
    corruption: Annotated[
        list[str] | None,
        typer.Option("--corruption", metavar="NAME", help="Corruption of the labelled images; repeatable."),
    ] = None,
    classes: common.Classes = None,
    templates: common.Templates = None,
    texts: common.Texts = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Find which sites make a requirement fail: several more passes.")
    ] = False,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            "--sensitivity",
            metavar="FILE",
            help="Results of `qclip sensitivity --output`: --bisect tries the worst sites first.",
        ),
    ] = None,
    output: common.ReportFolder = None,
    cache: common.Cache = True,
    batch: common.Batch = 32,
    strict: common.Strict = False,
    arch: common.Arch = None,
    device: common.Device = "cpu",
    seed: common.Seed = 0,
    threads: common.Threads = None,
    force: common.Force = False,
    json: common.Json = False,
) -> int:
    """Hold a quantized model to requirements on your images: each is met or not, at the bad end of its interval."""
    import qclip
    from qclip.artifact import is_artifact
    from qclip.data import load, read_lines
    from qclip.errors import InputError, ModelError
    from qclip.reliability.sets import kinds
    from qclip.rewrite import quantization
    from qclip.verification import blame, check, measurements, requirements, verify, worst_first

    wanted = requirements(",".join(require))
    if output is not None:
        comparison.check_output(output, force)
    common.set_threads(threads)
    if not is_artifact(artifact):
        raise ModelError(f"{artifact!r} is no artifact; make one with `qclip quantize`")
    if sensitivity is not None and not bisect:
        raise InputError("--sensitivity says where --bisect begins; give both, or neither")
    with common.progress() as progress:
        sets = [load(name, classes_file=classes, progress=progress) for name in data]
        settings: dict[str, Any] = {
            "ood": {k: [load(name, progress=progress) for name in names] for k, names in kinds(ood or []).items()},
            "dev": None if dev is None else load(dev, classes_file=classes, progress=progress),
            "train": None if train is None else load(train, classes_file=classes, progress=progress),
            "negatives": negatives,
            "corruptions": corruption or (),
            "templates": None if templates is None else read_lines(templates, "templates"),
            "texts": () if texts is None else read_lines(texts, "texts"),
            "seed": seed,
            "batch": batch,
            "strict": strict,
            "cache": cache,
            "device": device,
        }
        check(wanted, sets, **settings)
        common.say(f"loading {artifact} and {against}")
        pair = qclip.load_model(artifact, device), qclip.load_model(against, device, arch)
        order = None
        if sensitivity is not None:
            done = quantization(pair[0])
            assert done is not None  # it is an artifact
            order = worst_first(sensitivity, done.plans, done.provenance.get("source_sha256"))
        found = verify(*pair, wanted, sets, progress=progress, **settings)
        blamed = {}
        for each in dict.fromkeys(outcome.requirement for outcome in found.outcomes if not outcome.passed):
            if bisect:
                common.say(f"looking for the sites that make {each.text} fail")
                asked = settings | {"measurements": measurements(each)}
                held = partial(_passes, against=pair[1], require=[each], data=sets, progress=progress, **asked)
                try:
                    blamed[each.text] = blame(*pair, held, order)
                except InputError as why:  # the verdict stands, whoever is to blame
                    found.results.note(f"{each.text}: {why}")
    results = found.results
    results.meta["command"] = common.command_line()
    if output is not None:
        comparison.write(results, output)
    if json:
        outcomes = [_plain(outcome) for outcome in found.outcomes]
        common.print_json({"passed": found.passed, "requirements": outcomes, "sites": blamed, "notes": results.notes})
    else:
        for outcome in found.outcomes:
            print(_line(outcome))
        for text, sites in blamed.items():
            print(f"{text} holds with these sites float: {', '.join(sites)}")
        for note in results.notes:
            print(f"note: {note}")
        print("passed" if found.passed else "failed")
        if output is not None:
            print(f"\nreport: {output / 'report.html'}")
    return 0 if found.passed else FAILED


def _passes(model: Any, **settings: Any) -> bool:
    from qclip.verification import measure

    return measure(model, **settings).passed


def _plain(outcome: Outcome) -> dict[str, Any]:
    wanted = outcome.requirement
    return {
        "requirement": wanted.text,
        "on": outcome.where,
        "passed": outcome.passed,
        "metric": wanted.metric,
        "difference": wanted.difference,
        "bound": wanted.bound,
        "value": outcome.value,
        "low": outcome.low,
        "high": outcome.high,
        **({"reason": outcome.reason} if outcome.reason else {}),
    }


def _line(outcome: Outcome) -> str:
    """ "ok    top1>=-0.5 on pictures: -0.12 points [-0.31, +0.08]" """
    from qclip.reporting.units import metric

    wanted = outcome.requirement
    of, sign = metric(wanted.metric), "ok  " if outcome.passed else "FAIL"
    if outcome.value is None:
        return f"{sign}  {wanted.text} on {outcome.where}: {outcome.reason}"
    if wanted.difference:
        shown, interval = of.difference(outcome.value), of.difference_interval(outcome.low, outcome.high)
        shown += f" {of.unit}" if of.unit else ""
    else:
        shown, interval = of.value(outcome.value), of.interval(outcome.low, outcome.high)
    shown += f" {interval}" if interval else ""
    return f"{sign}  {wanted.text} on {outcome.where}: {shown}{f'; {outcome.reason}' if outcome.reason else ''}"
