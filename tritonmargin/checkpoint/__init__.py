"""Checkpoints of sharded heads: all of it or none, checked when they are read, for any number of ranks.

A checkpoint is a folder `step_0000001000` written by torch.distributed.checkpoint, and a `manifest.json` with the size
and the CRC-32 of every file. It is written as `step_0000001000.partial` and renamed as the last act: a folder without
the suffix is complete, whenever the job is killed. All ranks have to see the same file system.

    state = {"head": head.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
    tm.checkpoint.save(folder, state, step)

    if tm.checkpoint.load(folder, state) is not None:
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        epoch = state["epoch"]

A DTensor is written by all ranks, each its part, and read into whatever parts there are; a replicated one by the first
rank. Everything else has to be the same on all ranks.
"""

from tritonmargin.checkpoint.centers import export_centers, import_insightface
from tritonmargin.checkpoint.save_load import load, save
from tritonmargin.distributed.agreement import CheckpointError

__all__ = ["CheckpointError", "export_centers", "import_insightface", "load", "save"]
