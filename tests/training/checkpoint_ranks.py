"""Two processes load a checkpoint that one wrote, go on, and save; then meet damage and a failing disk.

    python -m tests.training.checkpoint_ranks FOLDER

FOLDER/plain holds the checkpoint of step 2. FOLDER/ddp and FOLDER/fsdp get those of step 4. Prints "done".
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.training.small_run import Average, Run, assert_equal_tensors, modules, small_run
from vfmvae.training.checkpoint import Checkpoints
from vfmvae.training.checkpoint_storage import CheckpointWriter

RANKS = 2


def replicated_run(seed: int) -> Run:
    model, critic = modules(seed)
    wrapped = DistributedDataParallel(model), DistributedDataParallel(critic)
    return Run(*wrapped, Average(model))


def sharded_run(seed: int) -> Run:
    mesh = init_device_mesh("cpu", (RANKS,))
    model, critic = modules(seed)
    # The last layer has one row: one rank holds it all.
    fully_shard(model.decoder, mesh=mesh, reshard_after_forward=False)
    fully_shard(critic, mesh=mesh)
    return Run(model, critic, Average(model))


def go_on(run: Run, folder: Path, name: str) -> None:
    """From the plain checkpoint two steps, a save in the background, and back to it again."""
    plain = Checkpoints(folder / "plain")
    assert plain.load_newest(run.state) is not None
    assert run.state.step == 2
    unwrapped = small_run(seed=50)
    plain.load_newest(unwrapped.state)
    assert_equal_tensors(whole(run), unwrapped.tensors())
    plain.close()
    saved = Checkpoints(folder / name)
    run.step()
    saved.save(run.state)
    run.step()
    saved.save(run.state)
    at_4 = whole(run)
    run.step()  # gathers the sharded weights, and leaves some gathered
    assert saved.load_newest(run.state) is not None
    assert_equal_tensors(whole(run), at_4)
    saved.close()
    if dist.get_rank() == 0:
        torch.save(at_4, folder / f"{name}.pt")


def whole(run: Run) -> dict[str, torch.Tensor]:
    """What the run holds, gathered from all ranks."""
    tensors = run.tensors().items()
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors}


def meet_faults(run: Run, folder: Path, rank: int) -> None:
    """Damage that one rank reads, and a write that fails on one rank, are known to all."""
    saved = Checkpoints(folder / "faults")
    for run.state.step in (1, 2):
        saved.save(run.state)
    saved.wait()
    dist.barrier()
    if rank == 0:
        (folder / "faults" / "step_00000002" / "__1_0.distcp").write_bytes(b"")
    dist.barrier()
    newest = saved.newest()
    assert newest is not None and newest.step == 1
    assert "__1_0.distcp has 0 bytes" in newest.damaged[0]

    real = CheckpointWriter.write_data
    if rank == 1:

        def write_data(self: CheckpointWriter, *arguments: object) -> object:
            raise OSError(28, os.strerror(28))

        CheckpointWriter.write_data = write_data  # type: ignore[assignment, method-assign]
    run.state.step = 3
    saved.save(run.state)
    try:
        saved.wait()
    except OSError as error:
        assert str(error).endswith("step_00000003: No space left on device"), error
    else:
        raise AssertionError(f"rank {rank} heard of no error")
    CheckpointWriter.write_data = real  # type: ignore[method-assign]
    dist.barrier()
    assert sorted(os.listdir(folder / "faults")) == ["step_00000001", "step_00000002.damaged"]
    saved.close()


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    go_on(replicated_run(seed=20), folder, "ddp")
    go_on(sharded_run(seed=30), folder, "fsdp")
    meet_faults(replicated_run(seed=40), folder, rank)
    dist.destroy_process_group()


def main() -> None:
    folder = Path(sys.argv[1])
    children = []
    for rank in range(RANKS):
        child = os.fork()  # quicker than new interpreters, and no thread runs here yet
        if child == 0:
            work(rank, folder)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * RANKS, codes
    print("done")


if __name__ == "__main__":
    main()
