"""Does a Postgres with Neuronpedia's tables take our export whole, by the statement its importer runs?

Run as `.venv/bin/python bench/import_neuronpedia.py --features RUN/features/NAME`; needs PostgreSQL's server programs
(Debian: postgresql). A server of its own is started in a temporary folder, without a port. It gets the six tables that
an import fills, columns as in gsae/tests/support/neuronpedia_tables.py, with their keys and what they hang on, and our
folder: one row each of release, model, source set and source, then features and activations as Neuronpedia's
lib/db/import.ts inserts them: the columns that the first line has, through jsonb, on conflict nothing. Met when each
line of the folder is a row of the tables with the same values. Not run: its web application, Prisma in front of the
first four tables.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SQL = {"text": "TEXT", "int": "INTEGER", "float": "DOUBLE PRECISION", "bool": "BOOLEAN", "json": "JSONB"}


def main() -> int:
    """Print one JSON line; return 0 when every row came back."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path)
    options = parser.parse_args()
    if not options.features:
        print(json.dumps({"bench": "import_neuronpedia", "met": True, "skipped": "needs --features"}))
        return 0
    from gsae.features import to_neuronpedia
    from gsae.tests.support.neuronpedia_tables import BATCHES, FILES

    with tempfile.TemporaryDirectory() as name, postgres(Path(name) / "server") as server:
        folder = to_neuronpedia(options.features, Path(name) / "out")
        server.run(tables())
        counts = {table: server.take(table, [folder / f"{file}.jsonl"]) for file, table in FILES.items()}
        for file, table in BATCHES.items():
            counts[table] = server.take(table, sorted((folder / file).iterdir()))
        version = server.run("SHOW server_version").strip()
    met = all(lines == same for lines, same in counts.values())
    rows = {table: lines for table, (lines, _) in counts.items()}
    same = {table: same for table, (_, same) in counts.items()}
    print(json.dumps({"bench": "import_neuronpedia", "met": met, "postgres": version, "lines": rows, "same": same}))
    return 0 if met else 1


def tables() -> str:
    """Statements that make the tables."""
    from gsae.tests.support.neuronpedia_tables import HANGS_ON, KEYS, TABLES, columns

    made = ["CREATE TABLE lines (of TEXT, line JSONB);"]
    for table in TABLES:
        parts = []
        for name, (kind, needed) in columns(table).items():
            parts.append(f'"{name}" {sql(kind)}{" NOT NULL" if needed else ""}')
        parts.append(f"UNIQUE ({listed(KEYS[table])})")
        for names, other in HANGS_ON.get(table, ()):
            parts.append(f'FOREIGN KEY ({listed(names)}) REFERENCES "{other}" ({listed(KEYS[other])})')
        made.append(f'CREATE TABLE "{table}" ({", ".join(parts)});')
    return "\n".join(made)


def sql(kind: str) -> str:
    return SQL[kind.removesuffix("[]")] + "[]" * kind.endswith("[]")


def listed(names: Any) -> str:
    return ", ".join(f'"{name}"' for name in names)


class Server:
    """A Postgres that answers on a socket in its folder."""

    def __init__(self, folder: Path) -> None:
        self._command = [*as_postgres(), "psql", "-h", str(folder), "-d", "postgres", "-v", "ON_ERROR_STOP=1", "-qtA"]

    def run(self, statements: str) -> str:
        """Run statements; return what they print."""
        done = subprocess.run(self._command, input=statements, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        return done.stdout

    def take(self, table: str, paths: list[Path]) -> tuple[int, int]:
        """Import files of JSON lines; return how many lines they have, and how many are rows with the same values."""
        from gsae.tests.support.neuronpedia_tables import KEYS, columns

        types, count = {name: sql(kind) for name, (kind, _) in columns(table).items()}, 0
        for path in paths:
            text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            lines = text.decode().replace("\\u0000", " ").strip().split("\n")
            count += len(lines)
            given = [name for name in types if name in json.loads(lines[0])]
            typed = ", ".join(f'"{name}" {types[name]}' for name in given)
            self.run(
                # A quote and a delimiter that no JSON holds: the lines are taken as they stand.
                "CREATE TEMP TABLE now (line JSONB);\n"
                "COPY now FROM STDIN (FORMAT csv, QUOTE e'\\x01', DELIMITER e'\\x02');\n"
                + "\n".join(lines)
                + f'\n\\.\nINSERT INTO "{table}" ({listed(given)}) SELECT {listed(given)} FROM jsonb_to_recordset('
                f"(SELECT jsonb_agg(line) FROM now)) AS t({typed}) ON CONFLICT DO NOTHING;\n"
                f"INSERT INTO lines SELECT '{table}', line FROM now;\n"
            )
        keys = " AND ".join(f"line->>'{name}' = t.\"{name}\"" for name in KEYS[table])
        absent = "ARRAY(SELECT jsonb_object_keys(to_jsonb(t)) EXCEPT SELECT jsonb_object_keys(line))"
        rows = f"\"{table}\" t JOIN lines ON of = '{table}' AND {keys}"
        return count, int(self.run(f"SELECT count(*) FROM {rows} WHERE to_jsonb(t) - {absent} = line"))


@contextmanager
def postgres(folder: Path) -> Iterator[Server]:
    """Start a server in a folder of its own, and stop it."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        sys.exit("bench/import_neuronpedia.py needs PostgreSQL's server programs (Debian: apt install postgresql).")
    folder.mkdir()
    if os.geteuid() == 0:
        for path in (folder.parent, folder):
            shutil.chown(path, "postgres")
    run = [*as_postgres()]
    subprocess.run(
        [*run, str(programs[-1] / "initdb"), "-D", str(folder), "-A", "trust"], check=True, stdout=subprocess.DEVNULL
    )
    ctl = [*run, str(programs[-1] / "pg_ctl"), "-D", str(folder), "-w", "-s"]
    options = f"-c listen_addresses='' -k {folder}"
    subprocess.run([*ctl, "-o", options, "-l", str(folder / "log"), "start"], check=True)
    try:
        yield Server(folder)
    finally:
        subprocess.run([*ctl, "-m", "immediate", "stop"], check=True)


def as_postgres() -> list[str]:
    """Postgres refuses to be root."""
    return ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []


if __name__ == "__main__":
    sys.exit(main())
