"""The report of benchmarks.gpu: the results of its steps as Markdown."""

from typing import Any

import torch

from benchmarks.timing import table


def report(results: dict[str, dict[str, Any]], device: torch.device) -> str:
    """All results as Markdown."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, tiny size"
    parts = [f"# {card}, torch {torch.__version__}"]
    rows = [
        [name.removeprefix("speed-"), variant, *((x["size"], x["iterations_per_s"], x["peak_gib"], x["cosine_to_fp32"])
         if "error" not in x else ("", x["error"], "", "")), "yes" if x.get("in_this_precision") else "no"]
        for name, result in results.items() for variant, x in result.get("variants", {}).items()
    ]  # fmt: skip
    columns = ["method", "variant", "patch", "iterations/s", "peak GiB", "cosine to fp32", "a network in it"]
    parts += [table(columns, rows)]
    rows = [[r["method"], "yes" if r["equal"] else f"no: {', '.join(r['differing'])}"]
            for r in results.values() if "equal" in r]  # fmt: skip
    parts += [table(["method", "4 + 4 iterations equal 8"], rows)]
    rows = [[r["method"], card, *("yes" if fit else "no" for fit in fits.values())]
            for r in results.values() for card, fits in r.get("fits", {}).items()]  # fmt: skip
    parts += [table(["method", "GiB", "fits", "with --recompute"], rows)]
    rows = [[name, r["iterations_per_s"], r["peak_memory_gib"],
             ", ".join(f"{key} {100 * share:.0f} %" for key, share in r["time_shares"].items() if share > 0.005)]
            for name, r in results.items() if "time_shares" in r]  # fmt: skip
    parts += [table(["training", "iterations/s", "peak GiB", "time"], rows)]
    rows = [[name, r["seconds"], r.get("error") or r.get("said", "done")] for name, r in results.items()]
    return "\n\n".join([*parts, table(["step", "seconds", "result"], rows)]) + "\n"
