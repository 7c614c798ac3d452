"""The browser's files show the features and appear whole or not at all, and its server serves nothing else."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gsae.errors import CorruptError, IncompatibleError, NotFoundError, UsageError
from gsae.features.browse import site as browser
from gsae.features.browse.ratings import Ratings
from gsae.features.browse.serving import MAX_BODY, Server
from gsae.features.browse.site import build_browser
from gsae.tests.support.browser_run import HOSTILE, ROWS, TEXTS, rows_fired_by, tokens_of, top_of, write_features


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_features(tmp_path / "run")
    write_features(tmp_path / "run", "relu-w70", architecture="relu", d_sae=70)
    return tmp_path / "run"


def read(path: Path) -> Any:
    return json.loads(path.read_text("ascii"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- files ---


def test_the_table_and_every_latents_page_show_the_features(run: Path) -> None:
    out = build_browser(run)
    index = read(out / "data/index.json")
    assert [sae["sae"] for sae in index["saes"]] == ["gated-w100", "relu-w70"]
    for n, d_sae in enumerate((100, 70)):
        table = read(out / f"data/{n}/table.json")
        assert table["rows"] == [rows_fired_by(latent) for latent in range(d_sae)]
        tops = [top_of(latent) if rows_fired_by(latent) else None for latent in range(d_sae)]
        assert table["max"] == [top and pytest.approx(top, rel=1e-3) for top in tops]
        assert table["top_token"] == [latent if rows_fired_by(latent) else None for latent in range(d_sae)]
        shards = [read(path) for path in sorted((out / f"data/{n}/latents").iterdir())]
        assert {len(shard) for shard in shards[:-1]} == {index["latents_a_shard"]}
        latents = [latent for shard in shards for latent in shard]
        assert [latent["latent"] for latent in latents] == list(range(d_sae))
        for latent in latents:
            assert latent["density"] == pytest.approx(rows_fired_by(latent["latent"]) / ROWS, rel=1e-3)
            assert len(latent["examples"]) == (4 if rows_fired_by(latent["latent"]) else 0)
        quantile, context, position, value, positions, values = latents[7]["examples"][1]
        assert (quantile, context, position, positions) == (None, 16, 27, [3, 27, 28])
        assert [value, *values] == pytest.approx([top_of(7) * 0.8 * f for f in (1, 0.25, 1, 0.5)], rel=1e-3)


def test_contexts_and_vocabularies_are_shared_and_are_all_there(run: Path) -> None:
    out = build_browser(run)
    index = read(out / "data/index.json")
    assert index["saes"][0]["contexts_from"] == index["saes"][1]["contexts_from"]
    each = index["saes"][0]["contexts_from"]["contexts_a_shard"]
    for context in range(0, 80, 2):
        found = read(out / f"data/contexts/0/{context // each:05d}.json")
        assert found[str(context)] == tokens_of(context)
    assert [p.name for p in (out / "data/vocabularies").iterdir()] == ["0.json"]
    assert read(out / "data/vocabularies/0.json") == list(TEXTS)


def test_files_of_data_are_plain_ascii_whatever_tokens_hold(run: Path) -> None:
    out = build_browser(run)
    for path in (out / "data").rglob("*.json"):
        assert path.read_bytes().isascii()
        assert not set(path.read_bytes()) & {0, 0x1B, 0x7F, 0x85}
    assert set(HOSTILE) <= set(read(out / "data/vocabularies/0.json"))


def test_the_same_features_give_the_same_bytes_and_are_not_written_again(run: Path, tmp_path: Path) -> None:
    one, two = build_browser(run), build_browser(run, out=tmp_path / "two")
    assert contents(one) == contents(two)
    (one / "data/0/table.json").write_text("kept")
    assert (build_browser(run) / "data/0/table.json").read_text() == "kept"


def test_other_features_replace_what_was_there(run: Path) -> None:
    out = build_browser(run)
    assert build_browser(run, ["relu-w70"]) == out
    assert [sae["sae"] for sae in read(out / "data/index.json")["saes"]] == ["relu-w70"]
    assert not (out / "data/1").exists()
    assert sorted(p.name for p in run.iterdir()) == ["browser", "features"]


def test_a_build_that_fails_leaves_what_was_there(run: Path) -> None:
    out = build_browser(run)
    before = contents(out)
    file = run / "features/relu-w70/examples.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    facts = json.loads((run / "features/relu-w70/features.json").read_text())
    (run / "features/relu-w70/features.json").write_text(json.dumps(facts | {"rows": ROWS + 1}))
    with pytest.raises(CorruptError, match=r"examples\.parquet"):
        build_browser(run)
    assert contents(out) == before
    assert sorted(p.name for p in run.iterdir()) == ["browser", "features"]


def test_simultaneous_builds_wait_for_each_other(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most, write = [], [], browser._write_sae

    def watched(*arguments: Any) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.1)
        write(*arguments)
        inside.pop()

    monkeypatch.setattr(browser, "_write_sae", watched)
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: build_browser(run), range(4)))
    assert set(built) == {run / "browser"}
    assert most == [1, 1]  # one of them wrote two SAEs, and the others found them
    assert sorted(path.name for path in run.iterdir()) == ["browser", "features"]


def test_without_texts_or_logits_there_are_only_ids(tmp_path: Path) -> None:
    write_features(tmp_path, words=False, logits=False)
    out = build_browser(tmp_path)
    assert read(out / "data/index.json")["saes"][0]["vocabulary"] is None
    assert not (out / "data/vocabularies").exists()
    assert read(out / "data/0/latents/00000.json")[0]["promoted"] is None


def test_no_path_of_this_machine_gets_into_the_files(tmp_path: Path) -> None:
    write_features(tmp_path, model="/home/someone/models/tiny", dataset="/data/secret/text.jsonl")
    for content in contents(build_browser(tmp_path)).values():
        assert b"someone" not in content
        assert b"secret" not in content
        assert str(tmp_path).encode() not in content


def test_what_cannot_be_browsed_is_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="gsae features"):
        build_browser(tmp_path / "nothing")
    with pytest.raises(NotFoundError, match=r"'other'\. It has those of gated-w100, relu-w70"):
        build_browser(run, ["other"])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("dear")
    with pytest.raises(UsageError, match="not a feature browser"):
        build_browser(run, out=mine)
    assert (mine / "notes.txt").read_text() == "dear"
    write_features(tmp_path / "newer", schema=2)
    with pytest.raises(IncompatibleError, match="update gsae"):
        build_browser(tmp_path / "newer")
    write_features(tmp_path / "short", d_sae=40)
    facts = tmp_path / "short/features/gated-w100/features.json"
    facts.write_text(facts.read_text().replace('"d_sae": 40', '"d_sae": 41'))
    with pytest.raises(CorruptError, match="40 latents of 41"):
        build_browser(tmp_path / "short")


# --- the server ---


@pytest.fixture
def server(run: Path, tmp_path: Path) -> Iterator[Server]:
    out = build_browser(run)
    (tmp_path / "secret.json").write_text("{}")
    (out / "link.json").symlink_to(tmp_path / "secret.json")
    (out / ".hidden.json").write_text("{}")
    (out / "key.pem").write_text("key")
    with Server(out, ratings=Ratings(tmp_path / "ratings.jsonl", 4)) as served:
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        yield served
        served.shutdown()


def ask(server: Server, target: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Any:
    """Return (status, headers, body) of a request that is sent as it is written."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    given = {"Host": f"127.0.0.1:{server.server_port}"} | {k.replace("_", "-"): v for k, v in headers.items()}
    if body is not None:
        given.setdefault("Content-Length", str(len(body)))
    for name, value in given.items():
        if value:
            connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found


def test_pages_are_served_with_a_strict_policy_and_only_to_this_machine(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    for target, kind in (("/", "text/html"), ("/app.js", "text/javascript"), ("/app.css", "text/css"),
                         ("/data/index.json", "application/json")):  # fmt: skip
        status, headers, body = ask(server, target)
        assert status == 200
        assert headers["Content-Type"].startswith(kind)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        head = ask(server, target, "HEAD")
        assert (head[0], head[2], head[1]["Content-Length"]) == (200, b"", str(len(body)))


@pytest.mark.parametrize(
    "target",
    [
        "/../secret.json", "/data/../../secret.json", "/%2e%2e/secret.json", "/..%2fsecret.json", "/..\\secret.json",
        "//etc/passwd", "/link.json", "/.hidden.json", "/key.pem", "/data", "/data/", "/data/0", "/index.html%00.json",
        "/nothing.json", "secret.json", "http://other/../secret.json",
    ],
)  # fmt: skip
def test_only_the_browsers_files_are_served(server: Server, target: str) -> None:
    status, headers, body = ask(server, target)
    assert status == 404
    assert b"secret" not in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_another_name_for_this_machine_is_refused(server: Server) -> None:
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1", ""):
        assert ask(server, "/", Host=host)[0] == 421
    assert ask(server, "/", Host=f"localhost:{server.server_port}")[0] == 200


def test_other_methods_are_refused(server: Server) -> None:
    assert ask(server, "/", "PUT", b"{}")[0] == 501
    assert ask(server, "/data/index.json", "DELETE")[0] == 501
    assert ask(server, "/data/index.json", "POST", b"{}")[0] == 405


def post(server: Server, body: bytes, **headers: str) -> int:
    ours = {"Origin": f"http://127.0.0.1:{server.server_port}", "Content_Type": "application/json"}
    return int(ask(server, "/ratings", "POST", body, **(ours | headers))[0])


def test_a_rating_is_on_the_disk_before_it_is_answered(server: Server, tmp_path: Path) -> None:
    assert post(server, b'{"trial": 2, "rating": 1}') == 200
    assert post(server, b'{"trial": 2, "rating": 2}') == 200
    lines = (tmp_path / "ratings.jsonl").read_text().splitlines()
    assert [json.loads(line)["rating"] for line in lines] == [1, 2]
    assert json.loads(ask(server, "/ratings")[2]) == {"2": 2}
    assert Ratings(tmp_path / "ratings.jsonl", 4).current() == {2: 2}


BAD_RATINGS = (
    *(b"", b"[]", b"{", b'{"trial": 4, "rating": 1}', b'{"trial": 0, "rating": 3}', b'{"trial": -1, "rating": 0}'),
    *(b'{"trial": true, "rating": 0}', b'{"trial": 0.0, "rating": 0}', b"[" * 1000),
)


def test_ratings_from_elsewhere_or_of_another_form_change_nothing(server: Server, tmp_path: Path) -> None:
    good = b'{"trial": 0, "rating": 1}'
    assert post(server, good, Origin="http://evil.example") == 403
    assert post(server, good, Origin="") == 403
    assert post(server, good, Content_Type="text/plain") == 415
    assert post(server, good, Content_Length="x") == 411
    assert post(server, b" " * (MAX_BODY + 1)) == 413
    for bad in BAD_RATINGS:
        assert post(server, bad) == 400, bad
    assert not (tmp_path / "ratings.jsonl").exists()


def test_a_port_that_is_taken_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is taken"):
        Server(tmp_path, server.server_port)
