"""The verbs that use what a study has trained: model, predict, evaluate."""

from __future__ import annotations

import csv as comma_separated
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from storage.errors import UserError
from study.cli.options import Code, Device, Storage, command_for, out, storage_url

if TYPE_CHECKING:
    from study.evaluation import Evaluation
    from study.model import TrainedModel
    from study.model_file import ModelDescription

logger = logging.getLogger(__name__)

MOST_COLUMNS = 12
"""Classes whose confusion is shown as a table; of more, the most frequent confusions."""
SHOWN_CONFUSIONS = 10

Source = Annotated[str, typer.Argument(help="Name of the study, or a .safetensors file that `study model` wrote.")]
Trial = Annotated[
    int | None,
    typer.Option(
        "--trial", min=0, help="Number of the trial. Default: the best whose model is kept.", show_default=False
    ),
]
Csv = Annotated[bool, typer.Option("--csv", help="Write comma-separated values to standard output.")]


def model(
    source: Source,
    trial: Trial = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Default: NAME-trial-N.safetensors, here.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    toml: Annotated[
        bool, typer.Option("--toml", help="Print the trial as a config file, to train it again or to extend.")
    ] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX file, with the normalisation in it.")] = False,
    storage: Storage = None,
    code: Code = None,
) -> None:
    """Take the best model of a study home: weights, classes, normalisation, and where it comes from.

    Example: study model quick --output best.safetensors
    """
    from study.config import extensions

    if toml and (onnx or output is not None):
        raise UserError(
            "--toml prints a config file and goes with neither --onnx nor --output: study model … > my.toml"
        )
    extensions.allow(code or ())
    if toml:
        typer.echo(_as_toml(source, storage, trial), nl=False)
        return
    from study import model_file
    from study.model import is_file, load_model, read_model

    content, called = read_model(source, storage, trial)
    description = model_file.describe(content, called)
    if is_file(source):
        stem = source.removesuffix(".safetensors")
    else:
        stem = f"{source.replace(os.sep, '-')}-trial-{description.trial}"
    file = output or Path(f"{stem}.{'onnx' if onnx else 'safetensors'}")
    written = onnx or output is not None or not is_file(source)
    if written and file.exists() and not force:
        raise UserError(f"the file {file} is there already; name another with --output, or replace it with --force")
    if onnx:
        from study.onnx_export import export

        loaded = load_model(source, storage_url(storage), trial, device="cpu")
        _write(file, lambda unfinished: export(loaded, unfinished))
    elif written:
        _write(file, lambda unfinished: unfinished.write_bytes(content))
    for line in _facts(description):
        out.print(line, soft_wrap=True)
    if not onnx:
        out.print(f"\nfrom study import load_model\nmodel = load_model({str(file)!r})\n"
                  'print(model.predict(["picture.jpg"]).names)', soft_wrap=True)  # fmt: skip


def predict(
    source: Source,
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    csv: Csv = False,
    trial: Trial = None,
    storage: Storage = None,
    device: Device = "auto",
    code: Code = None,
) -> None:
    """Say what a study's best model sees in pictures: file, class, probability.

    Example: study predict quick pictures/
    """
    from study.config import extensions
    from study.model import load_model

    extensions.allow(code or ())
    files = _pictures(pictures)
    trained = load_model(source, storage_url(storage), trial, device=device)
    writer = comma_separated.writer(sys.stdout, lineterminator="\n")
    width = max(len(str(file)) for file in files)
    if csv:
        writer.writerow(["file", "class", "probability"])
    used = 0
    for file, name, probability in _said(trained, files):
        used += 1
        if csv:
            writer.writerow([file, name, f"{probability:.6g}"])
        else:
            from storage.text import one_line

            typer.echo(f"{one_line(str(file)):<{width}}  {100 * probability:5.1f} %  {one_line(name)}")
    if used < len(files):
        sys.stdout.flush()
        raise UserError(f"{len(files) - used} of {len(files)} pictures could not be used; the lines above say why")


def evaluate(
    source: Source,
    root: Annotated[
        Path,
        typer.Option("--data-root", help="One folder of pictures a class; of train/ and test/ the pictures in test/."),
    ],
    csv: Csv = False,
    trial: Trial = None,
    storage: Storage = None,
    device: Device = "auto",
    code: Code = None,
) -> None:
    """Measure a study's best model on another folder of pictures.

    Example: study evaluate quick --data-root other-pictures
    """
    from study.config import extensions
    from study.evaluation import evaluate as evaluate_model
    from study.model import load_model

    extensions.allow(code or ())
    trained = load_model(source, storage_url(storage), trial, device=device)
    evaluation = evaluate_model(trained, str(root.expanduser()))
    if csv:
        writer = comma_separated.writer(sys.stdout, lineterminator="\n")
        heads = ["class", "pictures", "recall", "precision", "f1"]
        writer.writerow([*heads, *(f"called {name}" for name in evaluation.classes)])
        writer.writerows(
            [*row, *confused] for row, confused in zip(_rows(evaluation), evaluation.confusion.tolist(), strict=True)
        )
        return
    _print_evaluation(evaluation)


def _write(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all."""
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".study-model-") as folder:
            unfinished = Path(folder, file.name)
            write(unfinished)
            os.replace(unfinished, file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}; name another with --output") from None
    size = file.stat().st_size
    logger.info("wrote %s (%s)", file, f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.0f} kB")


def _facts(description: ModelDescription) -> Iterator[str]:
    """What a model is, a line each."""
    from storage.text import one_line

    d = description
    names = ", ".join(d.classes[:10]) + (f" and {len(d.classes) - 10} more" if len(d.classes) > 10 else "")
    arguments = ", ".join(f"{name} {value}" for name, value in d.arguments.items())
    shape = "x".join(map(str, d.shape))
    metric = "" if d.metric == "accuracy" else f", {d.metric.replace('_', ' ')} {d.value:.4f}"
    for line in (
        f"trial {d.trial} of {d.study!r}, epoch {d.epoch}: validation accuracy {d.accuracy:.4f}{metric}",
        f"network: {d.network}{f' ({arguments})' if arguments else ''}",
        f"input: {shape} {d.dtype}, normalised by mean {_numbers(d.mean)} and std {_numbers(d.std)}",
        f"{len(d.classes):,} classes: {names}",
        f"data: {d.config.get('data', {}).get('name', '?')}, fingerprint {d.data_fingerprint[:16]}; {d.protocol}",
    ):
        yield one_line(line)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:4]) + (", …" if len(values) > 4 else "")


def _as_toml(source: str, storage: str | None, trial: int | None) -> str:
    """A trial as a config file of its own."""
    from storage.text import one_line
    from study.config.loading import parse_config
    from study.config.toml import to_toml
    from study.model import is_file
    from study.search import space

    if is_file(source):
        from study import model_file
        from study.model import read_model

        d = model_file.describe(*read_model(source, storage, trial))
        study, number, chosen, seed, value, fingerprint = (
            d.study,
            d.trial,
            d.parameters,
            d.seed,
            d.value,
            d.data_fingerprint,
        )
        config = parse_config(d.config)
    else:
        study = source
        number, chosen, seed, value, config, fingerprint = _trial(source, storage, trial)
    winner = space.trial_config(config, chosen, seed)
    values = {
        name: each for name, each in space.settings(config, chosen).items() if space.relevant(config, chosen, name)
    }
    shown = {section: set(keys) for section, keys in winner.placed(values).items()}
    shown.setdefault("data", set()).update(("name", "protocol"))
    shown["search"] = {"seed"}
    winner = winner.model_copy(update={"description": f"Trial {number} of {study} again"})
    metric = config.search.metric.replace("_", " ")
    comments = (
        f"Trial {number} of the study {study!r}: {metric} {value:.4f} on the validation images.",
        f"Its data have the fingerprint {fingerprint[:16]}; where they are is not part of a config (--data-root).",
        "Train it again: study launch FILE.toml",
    )
    return to_toml(winner, shown, [one_line(comment) for comment in comments])


def _trial(name: str, storage: str | None, trial: int | None) -> tuple[int, dict[str, Any], int, float, Any, str]:
    """Number, parameters, seed, value, config and data fingerprint of a complete trial; None: of the best."""
    from optuna.trial import TrialState

    from storage.engine import reader
    from storage.queries import best_trial
    from study.create import open_study

    study = open_study(storage_url(storage), name)
    if trial is None:
        with reader(study.engine).connect() as connection:
            best = best_trial(connection, study.id)
        if best is None:
            raise UserError(f"no trial of {name!r} is complete yet; see: {command_for(study.url, 'status', name)}")
        trial = best[1]
    complete = {t.number: t for t in study.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    if trial not in complete:
        raise UserError(f"trial {trial} of {name!r} is not complete; see: {command_for(study.url, 'status', name)}")
    chosen = complete[trial]
    seed = int(chosen.user_attrs.get("seed", study.config.search.seed))
    fingerprint = str(study.study.user_attrs.get("data_fingerprint", ""))
    return trial, dict(chosen.params), seed, float(chosen.values[0]), study.config, fingerprint


def _pictures(paths: list[Path]) -> list[Path]:
    """The files that are named, and all pictures in folders that are, by name; hidden ones are left out.

    Raises:
        UserError: something that is not there, or a folder without pictures.
    """
    from study.training.data.decoding import accepted_endings

    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = [
                Path(folder, name)
                for folder, folders, names in os.walk(path)
                for name in names
                if not name.startswith(".") and Path(name).suffix.lower() in accepted_endings()
                if not any(part.startswith(".") for part in Path(folder).relative_to(path).parts)
            ]
            if not below:
                raise UserError(
                    f"no pictures in {path}: none of its files ends in {', '.join(sorted(accepted_endings()))}"
                )
            found += sorted(below)
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"no picture or folder {path}")
    return found


def _said(trained: TrainedModel, files: list[Path]) -> Iterator[tuple[Path, str, float]]:
    """File, class and probability; a file that cannot be used is logged and left out."""
    import numpy as np

    from study.model import BATCH
    from study.training.data.dataset import DataError

    for start in range(0, len(files), BATCH):
        usable, decoded = [], []
        for file in files[start : start + BATCH]:
            try:
                decoded.append(trained.decode(file))
                usable.append(file)
            except DataError as error:
                logger.warning("%s", error)
        if usable:
            probabilities = trained.probabilities(np.stack(decoded))
            labels = probabilities.argmax(1)
            for file, label, of in zip(usable, labels, probabilities, strict=True):
                yield file, trained.classes[label], float(of[label])


def _rows(evaluation: Evaluation) -> Iterator[list[Any]]:
    """A row of numbers a class, for a program."""
    measures = (evaluation.recall, evaluation.precision, evaluation.f1)
    for i, name in enumerate(evaluation.classes):
        yield [name, int(evaluation.counts[i]), *("" if each[i] != each[i] else f"{each[i]:.6g}" for each in measures)]


def _print_evaluation(evaluation: Evaluation) -> None:
    import numpy as np

    from dashboards.formatting import percent, plain_table

    low, high = (100 * end for end in evaluation.interval)
    out.print(
        f"{evaluation.images:,} pictures in {evaluation.folder}\n"
        f"accuracy {percent(evaluation.accuracy)} ({evaluation.correct:,} of {evaluation.images:,}; 95 % interval "
        f"{low:.2f} to {high:.2f} %, binomial)\n"
        f"balanced accuracy {percent(evaluation.balanced_accuracy)}, macro F1 {percent(evaluation.macro_f1)}\n",
        soft_wrap=True,
    )
    lines = [
        [name, f"{count:,}", *(percent(float(cell)) if cell else "–" for cell in measures)]
        for name, count, *measures in _rows(evaluation)
    ]
    out.print(plain_table("", ["class", "pictures", "recall", "precision", "F1"], lines, left=(0,)), soft_wrap=True)
    names, confusion = evaluation.classes, evaluation.confusion
    if len(names) <= MOST_COLUMNS:
        rows = [[name, *map(str, row)] for name, row in zip(names, confusion.tolist(), strict=True)]
        out.print(plain_table("of a class (row), called so (column)", ["", *names], rows, left=(0,)), soft_wrap=True)
        return
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:SHOWN_CONFUSIONS]
    pairs = [divmod(int(position), len(names)) for position in order]
    rows = [[names[of], names[called], str(wrong[of, called])] for of, called in pairs if wrong[of, called]]
    out.print(
        plain_table("most frequent confusions", ["of class", "called", "pictures"], rows, left=(0, 1)), soft_wrap=True
    )
