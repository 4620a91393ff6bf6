"""python -m export push and pull, against a small stand-in of the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from export.build import MANIFEST_RECORD
from export.manifest import SCHEMA, Beside, Built, Identity, Manifest, Model, TensorSpec
from export.store import Entry, PackageStore, sha256
from recipes import Recipe
from tests.export.conftest import forge
from tests.export.hub_stand_in import READER, TOKEN, Hub
from utils.files import ROOT

REPO = "someone/packages"
NAME = "transformer-0123456789abcdef"


def make_package(folder: Path, name: str = NAME, code: bytes = b"\0code" * 1000) -> Entry:
    """A package whose code is `code`: whole by all that is checked, and nothing that could run."""
    spec = TensorSpec((1, 16, 256), (4096, 256, 1), "float32")
    manifest = Manifest(
        schema=SCHEMA,
        identity=Identity(
            architecture={"transformer": {"num_layers": 2}, "vae": {"act_fn": "silu"}},
            recipe=json.loads(json.dumps(Recipe(execution="aoti").to_dict())),
            **dict.fromkeys(("dtype", "device", "arch", "torch", "diffusers", "sources"), "some"),
            **dict.fromkeys(("cuda", "triton", "transformers", "torchao", "cudnn_frontend", "flash_attention")),
        ),
        models={"after-1": Model("after", {"hidden_states": spec}, {}, {"norm.weight": spec}, ("norm.weight",), None)},
        built=Built("python -m export build --checkpoint tiny", "tiny", 2.0, "2025-01-01"),
    )

    def make(path: Path) -> Manifest:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}/code.so", code)
            archive.writestr(f"{name}/{MANIFEST_RECORD}", json.dumps(asdict(manifest)))
        return manifest

    return PackageStore(folder).write(name, make)[0]


@pytest.fixture
def package(tmp_path: Path) -> Entry:
    return make_package(tmp_path / "built")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, as the Hub of this process; the client's cache is an empty one."""
    with Hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def export(main: Callable) -> Callable:
    """export("push", ...): `python -m export push ...`, in this process."""
    return lambda *arguments: main("export.__main__", *arguments)


@pytest.fixture
def held(hub: Hub, export: Callable, package: Entry) -> str:
    """The commit of the stand-in that holds the package, pushed there."""
    done = export("push", package.path, "--repo", REPO)
    assert done.code == 0, done.err
    return hub.repositories[REPO].head


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "pulled"


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name; none where there is no folder."""
    return {file.name: file.read_bytes() for file in folder.glob("*") if not file.name.endswith(".lock")}


def test_pushed_and_pulled_by_commit_and_by_sha256(
    hub: Hub, held: str, export: Callable, package: Entry, out: Path
) -> None:
    for source, option, value in (
        (REPO, "--revision", held),
        (f"{REPO}/{NAME}.pt2", "--revision", held),
        (REPO, "--revision", held.upper()),
        (REPO, "--sha256", package.beside.sha256),
        (REPO, "--sha256", package.beside.sha256.upper()),
        (f"{REPO}/{NAME}.pt2", "--sha256", package.beside.sha256),
    ):
        folder = out / str(len(hub.requests))
        done = export("pull", source, option, value, "--out", folder)
        assert done.code == 0, done.err
        assert done.out.startswith(f"{folder / NAME}.pt2: ")
        assert "was there" not in done.out
        assert (
            "a package is native code, which runs with all your rights: run it only if you trust who built it"
            in done.lines
        )
        assert contents(folder) == contents(package.path.parent)
        assert [entry.beside for entry in PackageStore(folder).entries()] == [package.beside]
    assert hub.downloads(f"{NAME}.pt2") == [None], "the client's cache serves the others"


def test_the_line_that_push_prints_pulls(hub: Hub, export: Callable, package: Entry, out: Path) -> None:
    done = export("push", package.path, "--repo", REPO)
    page, command = done.out.splitlines()
    assert page == f"{hub.url}/{REPO}/blob/{hub.repositories[REPO].head}/{NAME}.pt2, sha256 {package.beside.sha256}"
    assert export(*command.removeprefix("python -m export ").split(), "--out", out).code == 0
    assert contents(out) == contents(package.path.parent)


def test_pushed_twice(hub: Hub, held: str, export: Callable, package: Entry) -> None:
    before = len(hub.repositories[REPO].commits)
    done = export("push", package.path, "--repo", REPO)
    assert done.out.splitlines()[0].endswith(", was there already")
    assert f"--revision {held}" in done.out
    assert len(hub.repositories[REPO].commits) == before


def test_another_package_of_a_name_is_not_pushed_over(
    hub: Hub, held: str, export: Callable, package: Entry, tmp_path: Path
) -> None:
    other = make_package(tmp_path / "other", code=b"\0other")
    line = export("push", other.path, "--repo", REPO).error()
    assert f"has a {NAME}.pt2 with sha256 {package.beside.sha256[:16]}, this one has" in line
    assert hub.repositories[REPO].head == held


def test_card_tells_of_all_packages(hub: Hub, held: str, export: Callable, package: Entry, tmp_path: Path) -> None:
    second = make_package(tmp_path / "second", "vae_decoder-0", b"\0decoder")
    assert export("push", second.path, "--repo", REPO).code == 0
    card = hub.repositories[REPO].commits[hub.repositories[REPO].head]["README.md"].decode()
    for entry in (package, second):
        assert f"pull {REPO}/{entry.path.name} --sha256 {entry.beside.sha256}\n" in card
        assert f"| {entry.path.name} | {entry.beside.size / 1e6:.2f} | fp32,execution=aoti | some some |" in card
    assert "native code" in card
    assert "hidden_states: float32[1, 16, 256]" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("readme", [b"# By hand\n", b"\xff\xfe# in UTF-16"])
def test_card_of_somebody_else_is_left(hub: Hub, held: str, export: Callable, tmp_path: Path, readme: bytes) -> None:
    before = hub.repositories[REPO].commit({"README.md": readme})
    second = make_package(tmp_path / "second", "vae_decoder-0")
    assert "has a README.md that isn't push's" in export("push", second.path, "--repo", REPO).error()
    assert hub.repositories[REPO].head == before


def test_damaged_package_is_not_pushed(hub: Hub, export: Callable, package: Entry) -> None:
    package.path.write_bytes(package.path.read_bytes()[:-1])
    assert "bytes, its manifest says" in export("push", package.path, "--repo", REPO).error()
    assert not hub.requests


def test_pushed_at_the_same_time_by_someone_else(
    hub: Hub, held: str, export: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import hub as client

    def slow_card(*arguments: object) -> str:
        hub.repositories[REPO].commit({"notes.txt": b"meanwhile"})
        return f"---\n---\n{client.MARK}"

    monkeypatch.setattr(client, "card", slow_card)
    second = make_package(tmp_path / "second", "vae_decoder-0")
    assert "was changed by someone else meanwhile: push again" in export("push", second.path, "--repo", REPO).error()


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ((), "native code, which runs with all your rights: pin it with --revision"),
        (("--revision", "main"), "--revision main: a package is native code"),
        (("--revision", "0123abc"), "give a commit's 40 hex digits"),
        (("--sha256", "12"), "--sha256 12: give 64 hex digits"),
    ],
)
def test_pull_wants_a_pin(hub: Hub, export: Callable, out: Path, pin: tuple, message: str) -> None:
    done = export("pull", REPO, *pin, "--out", out)
    assert message in done.error()
    assert done.code == 2
    assert not hub.requests
    assert not out.exists()


@pytest.mark.parametrize("source", ["packages", "someone/", "/etc/passwd", f"{REPO}/../x.pt2", f"{REPO}/README.md"])
def test_pull_of_what_is_no_package(hub: Hub, export: Callable, out: Path, source: str) -> None:
    done = export("pull", source, "--revision", "0" * 40, "--out", out)
    assert re.search("names no (package|repository of the Hub): give owner/name", done.error())
    assert not hub.requests


def test_what_the_hub_lacks(hub: Hub, held: str, export: Callable, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def line(source: str, *pin: str) -> str:
        done = export("pull", source, *pin, "--out", out)
        assert done.code == 2
        return done.error()

    assert f"{REPO} has no commit {'0' * 40}" in line(REPO, "--revision", "0" * 40)
    assert f"has no other.pt2 at {held}: it holds {NAME}.pt2" in line(f"{REPO}/other.pt2", "--revision", held)
    assert f"has no package with sha256 {'0' * 64} at" in line(REPO, "--sha256", "0" * 64)
    missing = "there is no someone/nothing on the Hub that is open to you: check its name, and `hf auth login`"
    assert missing in line("someone/nothing", "--revision", held)
    monkeypatch.delenv("HF_TOKEN")
    assert missing in line("someone/nothing", "--revision", held)
    hub.repositories[REPO].gated = True
    assert f"is gated: accept its terms on {hub.url}/{REPO}, then `hf auth login`" in line(REPO, "--revision", held)
    assert not contents(out)


@pytest.mark.parametrize(
    ("token", "message"),
    [(READER, "your token may not do this"), ("hf_wrong", "hf auth login"), (None, "hf auth login")],
)
def test_push_without_the_right_to(
    hub: Hub,
    export: Callable,
    package: Entry,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    token: str,
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    line = export("push", package.path, "--repo", REPO).error()
    assert message in line
    assert "hf auth login" in line
    assert REPO not in hub.repositories


def test_no_network(
    hub: Hub, held: str, export: Callable, package: Entry, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.failing = "/"
    assert (
        "the Hub failed on someone/packages: Server error '500"
        in export("pull", REPO, "--revision", held, "--out", out).error()
    )
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for command in (("pull", REPO, "--revision", held, "--out", out), ("push", package.path, "--repo", REPO)):
        assert "could not reach the Hub at http://127.0.0.1:9 (" in export(*command).error()
    assert not contents(out)


def test_not_what_was_pinned(hub: Hub, held: str, export: Callable, package: Entry, out: Path) -> None:
    line = export("pull", f"{REPO}/{NAME}.pt2", "--sha256", "0" * 64, "--out", out).error()
    assert f"has sha256 {package.beside.sha256} by its manifest, --sha256 says {'0' * 64}" in line
    assert not hub.downloads(f"{NAME}.pt2")
    assert not contents(out)


def test_any_damaged_byte(hub: Hub, held: str, export: Callable, package: Entry, out: Path, tmp_path: Path) -> None:
    """What the Hub holds is damaged: nothing gets into the folder, and nothing stays in the cache."""
    content = package.path.read_bytes()
    rng = random.Random(0)
    for place in rng.sample(range(len(content)), 5):
        damaged = content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
        commit = hub.repositories[REPO].commit({f"{NAME}.pt2": damaged})
        for pin in (("--revision", commit), ("--sha256", package.beside.sha256)):
            line = export("pull", f"{REPO}/{NAME}.pt2", *pin, "--out", out).error()
            assert f"{REPO}/{NAME}.pt2 has sha256 {''}" in line
            assert "nothing put into" in line
            assert not contents(out)
    assert not list((tmp_path / "cache").rglob("*.pt2"))
    assert all(b"code" * 3 not in file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file())


def test_damaged_although_the_hashes_agree(
    hub: Hub, held: str, export: Callable, package: Entry, out: Path, tmp_path: Path
) -> None:
    """A zip that is none, and one whose manifest says something else inside."""
    copy = tmp_path / "forged" / package.path.name
    shutil.copytree(package.path.parent, copy.parent)
    forge(copy, lambda manifest: manifest["identity"].update(torch="2.0.0"))
    assert sha256(copy) != package.beside.sha256
    beside = replace(package.beside, size=copy.stat().st_size, sha256=sha256(copy))
    for content, size, digest, words in (
        (copy.read_bytes(), beside.size, beside.sha256, "was built otherwise than the manifest beside it says, in"),
        (b"\0none", 5, "", "is no whole package"),
    ):
        copy.write_bytes(content)
        there = Beside(package.manifest, size, digest or sha256(copy)).to_json()
        commit = hub.repositories[REPO].commit({f"{NAME}.pt2": content, f"{NAME}.json": there.encode()})
        assert words in export("pull", REPO, "--revision", commit, "--out", out).error()
        assert not contents(out)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (None, f"has no {NAME}.json beside {NAME}.pt2"),
        (b"{}", "is damaged, or of another version of this program"),
        (b"no JSON", "is damaged, or of another version of this program"),
        (b"[" * 200_000, "is damaged, or of another version of this program"),
    ],
)
def test_manifest_that_is_none(
    hub: Hub, held: str, export: Callable, out: Path, manifest: bytes | None, words: str
) -> None:
    commit = hub.repositories[REPO].commit({f"{NAME}.json": manifest})
    assert words in export("pull", REPO, "--revision", commit, "--out", out).error()
    assert not hub.downloads(f"{NAME}.pt2")
    assert not contents(out)


@pytest.fixture
def beside_others(hub: Hub, held: str, package: Entry) -> str:
    """The commit that holds, besides the package, one of another version and one without a manifest."""
    older = package.path.with_suffix(".json").read_bytes().replace(b'"schema": 3', b'"schema": 2')
    changes = {"aaa-older.pt2": b"\0older", "aaa-older.json": older, "zzz-foreign.pt2": b"\0foreign"}
    return hub.repositories[REPO].commit({**changes})


def test_packages_that_cannot_be_read_are_left_out(
    hub: Hub, beside_others: str, export: Callable, package: Entry, out: Path
) -> None:
    done = export("pull", REPO, "--revision", beside_others, "--out", out)
    assert done.code == 0, done.err
    assert contents(out) == contents(package.path.parent)
    older, foreign = (line for line in done.lines if line.endswith(": left out"))
    assert f"{REPO}/aaa-older.json is damaged, or of another version" in older
    assert "(its schema is 2, this program reads 3)" in older
    assert f"{REPO} has no zzz-foreign.json beside zzz-foreign.pt2" in foreign
    named = export("pull", f"{REPO}/aaa-older.pt2", "--revision", beside_others, "--out", out)
    assert "its schema is 2, this program reads 3" in named.error()
    assert named.code == 1


def test_packages_that_cannot_be_read_do_not_keep_from_pushing(
    hub: Hub, beside_others: str, export: Callable, package: Entry, tmp_path: Path
) -> None:
    second = make_package(tmp_path / "second", "vae_decoder-0", b"\0decoder")
    done = export("push", second.path, "--repo", REPO)
    assert done.code == 0, done.err
    files = hub.repositories[REPO].commits[hub.repositories[REPO].head]
    assert {"aaa-older.pt2", "zzz-foreign.pt2", second.path.name} < files.keys()
    card = files["README.md"].decode()
    assert "can't read their manifests: aaa-older.pt2, zzz-foreign.pt2.\n" in card
    assert [line.split()[1] for line in card.splitlines() if line.startswith("## ")] == [
        f"{NAME}.pt2",
        second.path.name,
    ]
    assert len([line for line in done.lines if line.endswith(": the card has its name alone")]) == 2


def test_recipe_of_another_version(hub: Hub, held: str, export: Callable, package: Entry, out: Path) -> None:
    beside = asdict(package.beside)
    beside["manifest"]["identity"]["recipe"]["of_the_future"] = True
    commit = hub.repositories[REPO].commit({f"{NAME}.json": json.dumps(beside).encode()})
    assert "a recipe has no field 'of_the_future'" in export("pull", REPO, "--revision", commit, "--out", out).error()
    assert not contents(out)


def test_pulled_twice(hub: Hub, held: str, export: Callable, out: Path) -> None:
    assert export("pull", REPO, "--revision", held, "--out", out).code == 0
    before = (out / f"{NAME}.pt2").stat().st_mtime_ns
    done = export("pull", REPO, "--revision", held, "--out", out)
    assert done.out.endswith(", was there already\n")
    assert (out / f"{NAME}.pt2").stat().st_mtime_ns == before


@pytest.mark.parametrize("missing", [None, ".pt2", ".json"])
def test_never_overwrites(
    hub: Hub, held: str, export: Callable, out: Path, missing: str | None, package: Entry
) -> None:
    make_package(out, code=b"\0other")
    if missing:
        (out / f"{NAME}{missing}").unlink()
    before = contents(out)
    assert "is there, and isn't what was to be pulled" in export("pull", REPO, "--revision", held, "--out", out).error()
    assert contents(out) == before


@pytest.mark.parametrize("missing", [".pt2", ".json"])
def test_half_of_the_same_package_is_made_whole(
    hub: Hub, held: str, export: Callable, out: Path, missing: str, package: Entry
) -> None:
    shutil.copytree(package.path.parent, out)
    (out / f"{NAME}{missing}").unlink()
    assert not PackageStore(out).entries()
    assert export("pull", REPO, "--revision", held, "--out", out).code == 0
    assert contents(out) == contents(package.path.parent)


@pytest.mark.parametrize("inside", ["", "below"])
def test_target_that_is_no_folder(hub: Hub, held: str, export: Callable, tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("")
    before = len(hub.requests)
    done = export("pull", REPO, "--revision", held, "--out", tmp_path / "file" / inside)
    assert "is not a folder: choose another one" in done.error()
    assert done.code == 2
    assert len(hub.requests) == before


def test_target_that_is_not_writable(hub: Hub, held: str, export: Callable) -> None:
    assert (
        "the folder /proc/self is not writable"
        in export("pull", REPO, "--revision", held, "--out", "/proc/self").error()
    )


def in_a_child(hub: Hub, home: Path, *arguments: object) -> subprocess.Popen[str]:
    """`python -m export ...` in a process of its own, which takes HF_ENDPOINT from its environment; with progress."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "TQDM_POSITION": "-1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    environment = {**inherited, **own, "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "export", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_push_goes_on_where_it_was_broken_off(hub: Hub, package: Entry, tmp_path: Path) -> None:
    """What was sent before the Hub failed isn't sent again."""
    hub.failing = "/commit/"
    push = ("push", package.path, "--repo", REPO)
    child = in_a_child(hub, tmp_path / "home", *push)
    _, shown = child.communicate()
    assert child.returncode == 1
    assert "the Hub failed on someone/packages" in shown
    assert re.search(rf"{NAME}\.pt2: +100%\|", shown), shown
    assert list(hub.stored.values()) == [package.path.read_bytes()]
    assert list(hub.repositories[REPO].commits[hub.repositories[REPO].head]) == [".gitattributes"]
    hub.failing = None
    child = in_a_child(hub, tmp_path / "home", *push)
    _, shown = child.communicate()
    assert child.returncode == 0, shown
    assert len([path for method, path, _ in hub.requests if method == "PUT"]) == 1
    assert {f"{NAME}.pt2", f"{NAME}.json"} < hub.repositories[REPO].commits[hub.repositories[REPO].head].keys()


def test_connection_cut_in_the_middle(hub: Hub, held: str, export: Callable, out: Path, tmp_path: Path) -> None:
    """The client writes 10 MiB at a time, and goes on from what it has written."""
    mebibyte = 2**20
    large = make_package(tmp_path / "large", "transformer-large", random.Random(0).randbytes(21 * mebibyte))
    files = {file.name: file.read_bytes() for file in (large.path, large.path.with_suffix(".json"))}
    commit = hub.repositories[REPO].commit(dict(files))
    hub.cut[large.path.name] = 15 * mebibyte
    done = export("pull", f"{REPO}/{large.path.name}", "--revision", commit, "--out", out)
    assert done.code == 0, done.err
    assert hub.downloads(large.path.name) == [None, f"bytes={10 * mebibyte}-"]
    assert contents(out) == files


def test_killed_in_the_middle(hub: Hub, held: str, export: Callable, package: Entry, out: Path, tmp_path: Path) -> None:
    hub.hang[f"{NAME}.pt2"] = 2000
    child = in_a_child(hub, tmp_path / "home", "pull", REPO, "--revision", held, "--out", out)
    assert hub.hanging.wait(60)
    child.kill()
    _, shown = child.communicate()
    assert child.returncode == -9, shown
    assert re.search(rf"{NAME}\.json: +100%\|", shown), shown
    assert not PackageStore(out).entries()
    assert not list(out.glob("[!.]*"))
    child = in_a_child(hub, tmp_path / "home", "pull", REPO, "--revision", held, "--out", out)
    _, shown = child.communicate()
    assert child.returncode == 0, shown
    assert re.search(rf"{NAME}\.pt2: +100%\|", shown), shown
    assert contents(out) == contents(package.path.parent), "and nothing of the killed one is left"
