"""The table of docs/costs.md: what every recipe costs on TPU topologies, from the compiled programs; no TPU is needed.

    python benchmarks/recipe_costs.py --json=costs.jsonl > table.md

Runs launch/compile.py for each config and topology that the file does not have yet (a minute or two each), then prints
the table. Needs libtpu: pip install -e ".[tpu]".
"""

import json
import pathlib
import subprocess
import sys

from absl import app, flags

JSON = flags.DEFINE_string("json", "costs.jsonl", "File of the numbers, which is added to.")
TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e:4x4", "v5e:16x16", "v5p:4x4x4"], "TPU topologies.")
CONFIGS = flags.DEFINE_list("configs", None, "Names of configs; all when not given.")
SAMPLES = flags.DEFINE_integer("samples", 16, "Images per chip that are sampled together, on the first topology.")
ROOT = pathlib.Path(__file__).parent.parent


def main(_):
    configs = CONFIGS.value or sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    for config in configs:
        for topology in TOPOLOGIES.value:
            if any((row["config"], row["topology"]) == (config, topology) for row in rows()):
                continue
            samples = SAMPLES.value if topology == TOPOLOGIES.value[0] else 0
            command = [sys.executable, "launch/compile.py", f"--config=configs/{config}.py", f"--topology={topology}"]
            command += [f"--samples={samples}", f"--json={pathlib.Path(JSON.value).absolute()}"]
            subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)  # status 1: something does not fit
    print(table([row for row in rows() if row["config"] in configs and row["topology"] in TOPOLOGIES.value]))


def rows() -> list[dict]:
    """What the file has."""
    path = pathlib.Path(JSON.value)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(found: list[dict]) -> str:
    """Markdown, a line for each program, by recipe."""
    columns = ("recipe", "program", "topology", "images", "memory, GiB", "TFLOP", "traffic, GB", "links, MB")
    columns += ("ms at best", "images/s")
    lines = ["| " + " | ".join(columns) + " |", "|---|---|---|" + "--:|" * 7]
    for row in sorted(found, key=lambda row: (row["config"], TOPOLOGIES.value.index(row["topology"]))):
        cells = [row["config"], row["stage"], row["topology"], f"{row['batch']:,}"]
        if row["fits"]:
            binding = max(row["bounds"], key=row["bounds"].get)
            seconds, sent = row["bounds"][binding], sum(size for _, size in row["collectives"].values())
            cells += [f"{row['memory'] / 2**30:.2f}", f"{row['flops'] / 1e12:,.2f}", f"{row['traffic'] / 1e9:,.1f}"]
            cells += [f"{sent / 1e6:,.0f}", f"{1e3 * seconds:,.1f} ({binding})", f"{row['batch'] / seconds:,.0f}"]
        else:
            cells += ["does not fit", "", "", "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
