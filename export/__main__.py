"""Command line: `python -m export build --checkpoint tiny --out packages`, and what looks at packages."""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

from utils.quiet import quiet

with quiet():
    import torch

    import recipes
    from export import doctor, hub, order, verify
    from export.checks import check_file
    from export.manifest import refusal_by_machine
    from export.order import Order
    from export.store import Entry, PackageStore, default_folder, of_file
    from export.tables import description, line
    from recipes.recipe import Recipe
    from utils import checkpoints, command_line
    from utils.errors import Parser, UsageError, UserError, run_command
    from utils.request import check_side


def parser() -> Parser:
    parser = Parser(
        prog="python -m export", description="Ahead-of-time packages: .pt2 files of compiled code, without weights."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="compile a package for a recipe and shapes")
    build.add_argument("--checkpoint", required=True, help="hub id, folder, tiny, or random/flux-...")
    build.add_argument(
        "--recipe", help="a rung's name, with changes: aoti,attention=native; default: the fastest here, as packages"
    )
    build.add_argument("--resolutions", help="HEIGHTxWIDTH in pixels, several with commas (default: the checkpoint's)")
    build.add_argument("--batch", default="1", help="images a call, several with commas (default: %(default)s)")
    build.add_argument("--text-lengths", help="T5 tokens, several with commas (default: the checkpoint's)")
    build.add_argument("--image-size", help="HEIGHTxWIDTH of the image that Kontext edits (default: as drawn)")
    build.add_argument("--out", type=Path, default=default_folder(), help="the folder (default: %(default)s)")
    build.add_argument(
        "--embed-weights", action="store_true", help="put the weights inside, for this checkpoint alone (whole models)"
    )
    build.add_argument(
        "--dynamic", action="store_true", help="a model for all sizes between those given, instead of one for each"
    )
    listing = commands.add_parser("list", help="the packages in a folder")
    listing.add_argument("folder", type=Path, nargs="?", default=default_folder(), metavar="DIR")
    inspect = commands.add_parser("inspect", help="what a package fits, holds, and how it was built; loads nothing")
    check = commands.add_parser("verify", help="run a package's models against the eager modules, on random inputs")
    for command in (inspect, check):
        command.add_argument("file", type=Path, metavar="FILE", help="a package's .pt2 file, its .json beside it")
    check.add_argument("--checkpoint", help="whose weights (default: those that the package was built with)")
    examine = commands.add_parser("doctor", help="compile, load and run a small package, and say what is wrong")
    push = commands.add_parser("push", help="put a package on the Hugging Face Hub, with a card made from its manifest")
    push.add_argument("file", type=Path, metavar="FILE", help="a package's .pt2 file, its .json beside it")
    push.add_argument("--repo", required=True, metavar="OWNER/NAME", help="the Hub's repository, made if it is missing")
    push.add_argument("--private", action="store_true", help="where the repository is made: only for its owner")
    pull = commands.add_parser("pull", help="fetch packages from the Hugging Face Hub, checked before they are opened")
    pull.add_argument("source", metavar="OWNER/NAME[/FILE]", help="one package, or all of a repository")
    pull.add_argument("--revision", type=str.lower, metavar="COMMIT", help="the commit, 40 hex digits")
    pull.add_argument("--sha256", type=str.lower, metavar="HEX", help="the sha256 of the .pt2 file")
    pull.add_argument("--out", type=Path, default=default_folder(), help="the folder (default: %(default)s)")
    for command in (build, check, examine):
        command.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: cuda if there is")
    for command in (build, listing, inspect, check, examine, push, pull):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Raises UsageError: not positive whole numbers with commas between them."""
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UsageError(f"--{option} {text}: give positive whole numbers, with commas between them")
    return tuple(dict.fromkeys(map(int, words)))


def resolutions(text: str) -> tuple[tuple[int, int], ...]:
    """Raises UsageError: not HEIGHTxWIDTH with commas between them."""
    found = [_sides(word) for word in text.split(",")]
    if None in found:
        raise UsageError(f"--resolutions {text}: give HEIGHTxWIDTH, as in 1024x1024,768x1344")
    for side in itertools.chain(*(sides for sides in found if sides is not None)):
        check_side(f"--resolutions {text}: {side}", side)
    return tuple(dict.fromkeys(sides for sides in found if sides is not None))


def image_size(text: str) -> tuple[int, int]:
    """Raises UsageError: not one HEIGHTxWIDTH."""
    sides = _sides(text)
    if sides is None:
        raise UsageError(f"--image-size {text}: give HEIGHTxWIDTH, as in 768x1344")
    return sides


def _sides(word: str) -> tuple[int, int] | None:
    sides = word.split("x")
    return (int(sides[0]), int(sides[1])) if len(sides) == 2 and all(side.isdecimal() for side in sides) else None


def _given(option: str | None, default: str) -> str:
    return default if option is None else option


def run_build(arguments: argparse.Namespace) -> None:
    known = checkpoints.defaults(arguments.checkpoint)
    device = command_line.device(arguments)
    chosen = arguments.recipe and recipes.parse(arguments.recipe)
    wanted = Order(
        checkpoint=arguments.checkpoint,
        recipe=chosen or replace(command_line.fastest(arguments.checkpoint, device), execution="aoti"),
        resolutions=resolutions(_given(arguments.resolutions, f"{known.height}x{known.width}")),
        batches=numbers("batch", arguments.batch),
        text_lengths=numbers("text-lengths", _given(arguments.text_lengths, str(known.max_sequence_length))),
        embed_weights=arguments.embed_weights,
        dynamic=arguments.dynamic,
        image_size=None if arguments.image_size is None else image_size(arguments.image_size),
    )
    for entry, was_there in order.fill(wanted, arguments.out, device):
        print(f"{line(entry)}{', was there already' if was_there else ''}")


def run_list(arguments: argparse.Namespace) -> None:
    store = PackageStore(arguments.folder)
    entries, others, damaged = store.entries(), store.of_other_versions(), store.damaged()
    if not entries and not others and not damaged:
        raise UserError(f"no packages in {arguments.folder}: make one with `python -m export build`")
    for entry in entries:
        if (reason := entry.damage()) is None:
            print(line(entry))
        else:
            damaged.append(f"{entry.path} is damaged, for it {reason}: {_remedy(entry)}")
    for path in others:
        print(f"{path.name}: of another version of this program, and of no use to it")
    if damaged:
        raise UserError("; ".join(damaged))


def checked(path: Path) -> Entry:
    entry = of_file(path)
    check_file(entry, _remedy(entry))
    return entry


def _remedy(damaged: Entry) -> str:
    came_from = damaged.manifest.built.command
    return f"delete it and {damaged.path.stem}.json, and build it again (it came from `{came_from}`)"


def run_verify(arguments: argparse.Namespace) -> None:
    entry = checked(arguments.file)
    recipe = Recipe.from_dict(entry.manifest.identity.recipe)
    device = command_line.device(arguments)
    if (reason := refusal_by_machine(entry.manifest.identity, device)) is not None:
        raise UserError(f"{entry.path} {reason}: it can be verified where it runs")
    if recipe.execution != "aoti":
        raise UserError(f"{entry.path} says that it was built for execution={recipe.execution}: a package's is aoti")
    built_with = entry.manifest.built.checkpoint
    if arguments.checkpoint is None and built_with not in checkpoints.CHECKPOINTS:
        raise UsageError(f"{entry.path} was built with weights from {built_with}: say where they lie with --checkpoint")
    checkpoint = arguments.checkpoint or built_with
    _, library = order.pipeline(checkpoint, recipe, arguments.file.parent, device)
    errors = verify.verify(entry, library)
    for error in errors:
        print(error)
    wrong = [error.model for error in errors if not error.ok]
    if wrong:
        raise UserError(f"{entry.path} computes something else than the eager modules: {', '.join(wrong)}")


def run_doctor(arguments: argparse.Namespace) -> None:
    # Also a CUDA device that isn't there: why is what is to be found.
    asked = torch.device("cuda") if arguments.device == "cuda" else command_line.device(arguments)
    findings = doctor.examine(asked)
    for finding in findings:
        print(finding)
    wrong = [finding for finding in findings if finding.remedy is not None]
    if wrong:
        raise UserError(f"packages don't work here: {wrong[0].subject}: {wrong[0].found}; {wrong[0].remedy}")


def run_push(arguments: argparse.Namespace) -> None:
    entry = checked(arguments.file)
    pushed = hub.push(entry, arguments.repo, arguments.private)
    print(f"{pushed.url}, sha256 {entry.beside.sha256}{', was there already' if pushed.was_there else ''}")
    print(f"python -m export pull {arguments.repo}/{entry.path.name} --revision {pushed.commit}")


def run_pull(arguments: argparse.Namespace) -> None:
    pin = hub.Pin(arguments.revision, arguments.sha256)
    print(f"{hub.NATIVE_CODE}: run it only if you trust who built it", file=sys.stderr)
    for entry, was_there in hub.pull(arguments.source, pin, arguments.out):
        print(f"{line(entry)}{', was there already' if was_there else ''}")


COMMANDS = {
    "build": run_build,
    "list": run_list,
    "inspect": lambda arguments: print(description(checked(arguments.file))),
    "verify": run_verify,
    "doctor": run_doctor,
    "push": run_push,
    "pull": run_pull,
}


def main() -> None:
    arguments = parser().parse_args()
    with torch.inference_mode(False):
        run_command(lambda: COMMANDS[arguments.command](arguments), arguments.debug)


if __name__ == "__main__":
    main()
