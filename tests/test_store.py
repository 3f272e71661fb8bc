"""Folders on object storage: what an address may be, that it leaks nothing, and that what is there is what is here."""

import json
import os
import shutil
import sys

import fsspec
import numpy as np
import pytest

from potstill import config, pipeline
from potstill.cli import main
from potstill.data import load
from potstill.errors import BadInput, BrokenFile, Failed, Refused, redacted, shown
from potstill.inventory import damage
from potstill.store import Remote, checked, place
from potstill.synthesize import surrogate
from runs import RECIPE, digits_like, results
from test_surrogate import SHAPE, contents, images_of, write

SECRET = "hunter2/x+y"


@pytest.fixture(autouse=True)
def memory():
    """The files of ``memory://``, which are of the process, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return files


# ------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ftp://host/x", "ftp:// is no storage that is known; known are file://, memory://, s3://"),
        ("S3://bucket/x", "3:// is no storage that is known"),
        ("http://host/x", "http:// is no storage that can be listed and written"),
        ("https://host/x", "https:// is no storage that can be listed and written"),
        ("simplecache::s3://bucket/x", "an address of one storage is expected"),
        ("zip://a.zip::s3://bucket", "an address of one storage is expected"),
        ("plain/folder", "an address of one storage is expected"),
        (f"s3://key:{SECRET}@bucket/x", "no user, password or port within an address; s3:// takes its credentials from the environment"),
        ("s3://key@bucket/x", "no user, password or port"),
        (f"s3://key:{SECRET}", "no user, password or port"),
        (f"s3://bucket/x?token={SECRET}", "where tokens travel"),
        (f"s3://bucket/x#{SECRET}", "where tokens travel"),
        ("s3://", "the name of a bucket or folder is expected after s3://"),
        ("s3:///x", "the name of a bucket"),
        ("file://host/x", "three slashes and a path are expected after file:"),
        ("file:///", "three slashes and a path"),
        ("memory://a/../b", "plain names between single slashes"),
        ("memory://a//b", "plain names between single slashes"),
        ("memory://a/*", "plain names between single slashes"),
        ("memory://a/\x1b[2J", "plain names between single slashes"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_and_not_repeated(url, expected, capsys, place):
    with pytest.raises(ValueError) as found:
        checked(url)
    assert expected in str(found.value)
    assert SECRET not in str(found.value)
    if not url.isprintable():
        return
    for section, key in (({"surrogate": {"n": 4, "store": url}}, "surrogate.store"), ({"data": {"kind": "npz", "path": url}}, "data.path")):
        if "://" not in url and key == "data.path":
            continue  # a path of this machine
        assert place.run("synthesize", **section) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"potstill: {key}: ")
        assert expected in err
        assert len(err.splitlines()) == 1
        assert SECRET not in out + err
        assert not place.out.exists()


@pytest.mark.parametrize("url", ["s3://bucket", "s3://my-bucket.x/a b/c@d.e", "memory://a/b", "file:///a/b", "hf://datasets/a/b"])
def test_an_address_is_kept_as_it_is(url):
    if "@" in url:
        with pytest.raises(ValueError):
            checked(url)
        return
    assert checked(url) == checked(url + "/") == url
    assert str(place(url)) == url.removeprefix("file://")


def test_what_may_be_a_secret_is_left_out_of_messages():
    text = f"see 's3://key:{SECRET}@bucket/x' and https://h/x?sig={SECRET} or s3://key:hunter2/x; s3://bucket/a is fine, zoo:a too"
    assert redacted(text) == "see 's3://***@bucket/x' and https://h/x?*** or s3://key***/x; s3://bucket/a is fine, zoo:a too"
    token = "hf_" + "a" * 30
    assert redacted(f"{token} at s3://key:{SECRET}@bucket") == "hf_*** at s3://***@bucket"
    assert shown(f"s3://key:{SECRET}@bucket\x1b[2J {token}") == "s3://***@bucket\\x1b[2J hf_***"


def test_a_secret_in_an_override_is_in_no_message(place, capsys):
    path = place.write()
    for words in (
        [f"surrogate.store=s3://key:{SECRET}@bucket"],
        [f"surrogate.stor=s3://key:{SECRET}@b"],
        [f"teacher.path=s3://k:{SECRET}@b"],
    ):
        assert main(["synthesize", str(path), "--out", str(place.out), *words]) == 2
        out, err = capsys.readouterr()
        assert "hunter2" not in out + err
        assert not place.out.exists()


def test_a_run_is_in_a_folder_of_this_machine(place, capsys):
    assert main(["synthesize", str(place.write()), "--out", "s3://bucket/run"]) == 2
    assert capsys.readouterr().err == "potstill: --out: a folder of this machine is expected; images go elsewhere by surrogate.store\n"
    assert sorted(os.listdir(place.folder)) == ["data.npz", "recipe.yaml", "teacher"]


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs")])
def test_a_package_that_is_missing_is_named(protocol, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match=f"{protocol}:// needs {package}; install it: pip install {package}"):
        place(f"{protocol}://bucket/x").exists()


def test_a_storage_that_does_not_answer_is_one_error_without_secrets(memory, monkeypatch):
    def fail(*_, **__):
        raise ValueError(f"403 at https://host/x?sig={SECRET}\nmore")

    monkeypatch.setattr(type(memory), "cat_file", fail)
    with pytest.raises(Failed) as found:
        Remote("memory://a/b").read_bytes()
    assert str(found.value) == "memory://a/b: the storage does not answer as it should (ValueError: 403 at https://host/x?***)"


def test_half_an_object_is_noticed(memory, monkeypatch, tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    monkeypatch.setattr(type(memory), "size", lambda *_: 2)
    with pytest.raises(Failed, match="memory://a/b: 2 bytes have arrived of 3"):
        Remote("memory://a/b").put(tmp_path / "a")


# ------------------------------------------------------------------ surrogates


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    return f"file://{tmp_path}/far/away" if request.param == "file" else "memory://far/away"


def there(url):
    """The files of a store, by name."""
    found = place(url)
    if isinstance(found, Remote):
        return {str(name): p.read_bytes() for name, p in found.find()}
    return contents(found)


def test_what_is_kept_elsewhere_is_what_is_kept_here(tmp_path, url):
    here = write(tmp_path / "here")
    folder = write(tmp_path / "s", store=url)
    assert sorted(os.listdir(folder)) == ["manifest.json", "store.json"]
    found = there(url)
    assert json.loads(found.pop("identity.json")) == {"format": "potstill-surrogate/1", "identity": "i"}
    assert found == contents(here)
    for source in (folder, url, place(url)):
        read = surrogate.read(source)
        assert read.dtype == np.uint8
        assert np.array_equal(read, surrogate.read(here))
        assert surrogate.columns(source) == surrogate.columns(here)
        assert [len(part) for part in surrogate.parts(source)] == [8, 8, 4]
        surrogate.check(source)
    assert surrogate.digest(folder) == surrogate.digest(here)
    assert sorted(os.listdir(folder)) == ["manifest.json", "store.json"]  # nothing that was fetched stays


def test_values_of_a_storage_are_those_of_the_folder(tmp_path):
    make = images_of(lambda n, noise: noise.normal("x", (n, *SHAPE)))
    here = write(tmp_path / "here", make, pixels=False)
    found = surrogate.read(write(tmp_path / "s", make, pixels=False, store="memory://v"))
    assert found.dtype == np.float32
    assert np.array_equal(found, surrogate.read(here))
    assert isinstance(found, np.memmap)  # on the disk, not in memory
    found[0] = 0  # as torch would want to be able to


def test_shards_elsewhere_are_kept_when_a_run_goes_on(tmp_path, url):
    expected = contents(write(tmp_path / "here", batch=4))
    left = iter([True] * 3 + [False])
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", batch=4, store=url, keep_going=lambda: next(left))
    assert set(there(url)) == {"identity.json", "shard-00000.parquet"}
    assert sorted(os.listdir(tmp_path / "s")) == []
    asked = []
    write(tmp_path / "other run", batch=4, store=url, keep_going=lambda: asked.append(1) or True)
    assert len(asked) == 3  # batches of the two shards that were missing
    assert {k: v for k, v in there(url).items() if k != "identity.json"} == expected
    asked.clear()
    write(tmp_path / "third run", batch=4, store=url, keep_going=lambda: asked.append(1) or True)
    assert asked == []
    assert contents(tmp_path / "third run") == contents(tmp_path / "other run")


def test_what_is_of_another_is_never_overwritten(tmp_path, url):
    write(tmp_path / "s", store=url)
    before = there(url)
    with pytest.raises(Refused, match="holds another surrogate; nothing is overwritten: choose another store"):
        write(tmp_path / "t", identity="j", store=url)
    assert there(url) == before
    target = place(f"{url}/b")
    (tmp_path / "file").write_bytes(b"mine")
    if isinstance(target, Remote):
        (target / "file").put(tmp_path / "file")
    else:
        target.mkdir()
        shutil.copy(tmp_path / "file", target)
    with pytest.raises(Refused, match="holds something that is no surrogate"):
        write(tmp_path / "u", store=f"{url}/b")
    assert there(f"{url}/b") == {"file": b"mine"}


def test_a_shard_that_was_changed_elsewhere_is_noticed(tmp_path, memory):
    folder = write(tmp_path / "s", store="memory://m")
    data = bytearray(memory.cat_file("/m/shard-00001.parquet"))
    data[len(data) // 2] ^= 1
    memory.pipe_file("/m/shard-00001.parquet", bytes(data))
    for source in (folder, "memory://m"):
        with pytest.raises(BrokenFile, match=r"memory://m/shard-00001\.parquet: not the file that the manifest describes"):
            surrogate.read(source)
    memory.rm_file("/m/shard-00001.parquet")
    with pytest.raises(BrokenFile, match=r"memory://m/shard-00001\.parquet: no such file"):
        surrogate.read(folder)
    memory.rm_file("/m/manifest.json")
    with pytest.raises(BrokenFile, match=r"memory://m/manifest\.json: no such file"):
        surrogate.read("memory://m")
    assert os.listdir(folder).count("manifest.json") == 1


@pytest.mark.parametrize("content", ["{}", "[]", '{"url": 3}', '{"url": "/etc"}', '{"url": "../other"}', "no"])
def test_an_address_that_was_forged(tmp_path, content):
    folder = write(tmp_path / "s", store="memory://m")
    (folder / "store.json").write_text(content)
    with pytest.raises(BrokenFile, match=r"store\.json"):
        surrogate.read(folder)
    (folder / "store.json").write_text(json.dumps({"url": f"s3://a:{SECRET}@b"}))
    with pytest.raises(BadInput, match="no user, password") as found:
        surrogate.read(folder)
    assert "hunter2" not in str(found.value)


def test_an_address_leads_no_further(tmp_path, memory):
    write(tmp_path / "s", store="memory://m")
    memory.pipe_file("/n/store.json", b'{"url": "memory://m"}')
    memory.pipe_file("/n/manifest.json", memory.cat_file("/m/manifest.json"))
    with pytest.raises(BrokenFile, match=r"memory://n/shard-00000\.parquet: no such file"):
        surrogate.read("memory://n")


# ------------------------------------------------------------------ whole runs


def test_a_run_with_a_store_ends_in_the_same_bytes(place, url):
    assert place.run("run") == 0
    here = results(place.out)
    shutil.move(place.out, place.folder / "here")
    surrogates = {"surrogate": {**place.recipe["surrogate"], "store": url}}
    assert place.run("run", **surrogates) == 0
    found = results(place.out)
    shards = {name for name in here if name.endswith(".parquet")}
    assert len(shards) == 2
    assert {k: v for k, v in found.items() if not k.endswith("store.json")} == {k: v for k, v in here.items() if k not in shards}
    elsewhere = there(url)
    assert all(elsewhere[name.removeprefix("surrogate/")] == here[name] for name in shards)
    assert (place.out / "report.html").exists()
    assert damage(place.out) == []
    assert place.run("run", **surrogates) == 0  # done already


def test_a_shard_that_is_gone_elsewhere_is_made_again(place, tmp_path):
    store = tmp_path / "far"
    sections = {"evaluate": None, "report": None} | {"surrogate": RECIPE["surrogate"] | {"store": f"file://{store}"}}
    assert place.run("run", **sections) == 0
    before = contents(store)
    (store / "shard-00000.parquet").unlink()
    assert place.run("run", **sections) == 0
    assert contents(store) == before


def test_what_unpacks_to_far_more_than_it_is_is_refused_elsewhere_too(memory, tmp_path):
    np.savez_compressed(tmp_path / "data.npz", images=np.zeros((300, 1024, 1024), np.uint8))
    Remote("memory://far/data.npz").put(tmp_path / "data.npz")
    with pytest.raises(BadInput, match=r"^memory://far/data.npz: .* bytes that unpack to .* or more, over 100 times as many"):
        load(config.FileData(kind="npz", path="memory://far/data.npz"))


def test_damage_elsewhere_is_named(place, memory):
    surrogates = {"surrogate": {**place.recipe["surrogate"], "store": "memory://r"}}
    assert place.run("synthesize", **surrogates) == 0
    assert damage(place.out) == []
    memory.rm_file("/r/shard-00001.parquet")
    assert damage(place.out) == ["memory://r/shard-00001.parquet: no such file"]


def test_another_store_is_another_recipe(place, capsys):
    surrogates = {**place.recipe["surrogate"], "store": "memory://r"}
    assert place.run("synthesize", surrogate=surrogates) == 0
    assert place.run("synthesize", surrogate=surrogates | {"store": "memory://t"}) == 2
    assert "stage synthesize was begun here from other inputs (differs: surrogate.store)" in capsys.readouterr().err


def test_a_recipe_without_a_store_is_hashed_as_ever():
    recipe = config.check(RECIPE)
    assert "store" not in recipe.model_dump(mode="json")["surrogate"]
    assert "store" not in pipeline._plain({"section": recipe.surrogate})["section"]
    stored = config.check(RECIPE | {"surrogate": {"store": "s3://b/x/"}})
    assert stored.model_dump(mode="json")["surrogate"]["store"] == "s3://b/x"


def test_two_surrogates_do_not_share_a_store():
    both = {"surrogate": {"store": "s3://b/x"}, "surrogates": {"more": {"store": "s3://b/x/"}}}
    with pytest.raises(config.RecipeError, match="surrogates: two have the same store, s3://b/x"):
        config.check(RECIPE | both)


# ------------------------------------------------------------------ data


def test_data_of_a_storage_is_data_of_a_folder(tmp_path, memory):
    from PIL import Image

    images, labels = digits_like(12)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "data" / f"{label + 8}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(tmp_path / "data" / f"{label + 8}" / f"{i}.png")
    (tmp_path / "data" / "notes.txt").write_text("no image")
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    (tmp_path / "points.csv").write_text("a,b\n" + "".join(f"{i},{i * i}\n" for i in range(9)))
    write(tmp_path / "shards")
    for name in ("data", "shards"):
        for path in sorted(p for p in (tmp_path / name).rglob("*") if p.is_file()):
            memory.pipe_file(f"/d/{path.relative_to(tmp_path)}", path.read_bytes())
    for name in ("data.npz", "points.csv"):
        memory.pipe_file(f"/d/{name}", (tmp_path / name).read_bytes())
    for kind, name in (("folder", "data"), ("npz", "data.npz"), ("parquet", "shards"), ("parquet", "shards/shard-00000.parquet")):
        near, far = (load(config.FileData(kind=kind, path=f"{root}/{name}")) for root in (tmp_path, "memory://d"))
        assert (near.train.digest(), near.test.digest(), near.name) == (far.train.digest(), far.test.digest(), far.name)
    near, far = (load(config.ValuesData(kind="values", path=f"{root}/points.csv")) for root in (tmp_path, "memory://d"))
    assert near.train.digest() == far.train.digest()


@pytest.mark.parametrize("kind", ["folder", "npz", "parquet"])
def test_data_that_is_not_there(kind, memory):
    with pytest.raises(BadInput, match="memory://d/nothing: no such file or folder"):
        load(config.FileData(kind=kind, path="memory://d/nothing"))
    memory.pipe_file("/d/broken", b"PK\x03\x04")
    with pytest.raises(BadInput, match="memory://d/broken: "):
        load(config.FileData(kind=kind, path="memory://d/broken"))
