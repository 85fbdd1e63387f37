"""One rank that reads batches until it is killed: python read_until_killed.py JSON-of-arguments.

Its record holds what a training checkpoint would: the loader's state, and what was seen until then.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from vfmvae.atomic import write_atomically
from vfmvae.data import Backend, ImageLoader, open_data

STEP_S = 0.05  # that a training step would take


def main(data: str, record: str, start: int, backend: Backend, **ranks: int) -> None:
    """`ranks`: rank, world_size, workers and batch_size of the loader."""
    source = open_data(data, "train", 16, seed=5)
    loader = ImageLoader(source, backend=backend, **ranks)
    loader.load_state_dict({"seen_images": start})
    seen: list[dict[str, object]] = []
    for batch in loader:
        faults = [fault.key for fault in batch["faults"]]
        seen.append({**loader.state_dict(), "rank": ranks["rank"], "keys": batch["key"], "faults": faults})
        text = json.dumps(seen)
        write_atomically(Path(record), lambda path, text=text: path.write_text(text))
        time.sleep(STEP_S)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
