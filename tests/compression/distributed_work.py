"""The script that `test_training` runs in two processes: all steps, with metrics of the first process as JSON.

    torchrun --nproc-per-node 2 tests/compression/distributed_work.py FOLDER

FOLDER has dense.pt (a checkpoint) and images; without torchrun the same figures come from one process.
"""

import json
import sys
from pathlib import Path

import torch

import ssmcompress
from ssmcompress import processes
from ssmcompress.compression.finetune.loop import finetune
from ssmcompress.compression.finetune.recipe import Recipe
from ssmcompress.data import open_images
from ssmcompress.data.batches import Batches
from ssmcompress.data.content import different
from ssmcompress.data.signature import sign_images
from ssmcompress.evaluation.measure import evaluate
from ssmcompress.models.learnt import LearntFrom


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    processes.start("cpu")
    several = processes.count() > 1
    dense = ssmcompress.load(folder / "dense.pt")
    images = open_images(folder / "images", dense.config.num_classes)
    share = Batches(images, dense.transform(), processes.shard(range(len(images))), batch_size=7)
    plan = ssmcompress.calibrate(dense, share, ratio=0.3, distributed=several)
    pruned = ssmcompress.prune(dense, plan)
    found = evaluate(pruned, share, dense=dense, distributed=several)
    share.sync()
    everything = Batches(images, dense.transform(), range(len(images)))
    result = {
        "processes": processes.count(),
        "evaluation": vars(found),
        "digests": len(different(share.digests)),
        "overlap": LearntFrom().add(share).count(share),
        "signature": sign_images(share),
        "calibration": {
            name: [value.tolist() for value in getattr(plan.calibration, name)]
            for name in ("gap_deltas", "kept", "scores")
        },
        "images": plan.calibration.images,
    }
    # Weights independent of the last digit of the calibration; one step of 14 images, with mixup.
    pruned = ssmcompress.prune(dense, ssmcompress.make_plan(dense, ratio=0.3))
    for name, changes in {
        "step": {},
        "mixed": {"mixup": 0.8, "cutmix": 1.0, "randaugment": "rand-m9-mstd0.5-inc1", "erasing": 0.5},
        "accumulated": {"accumulate": 2, "mixup": 0.8},
    }.items():
        recipe = Recipe(epochs=1, batch_size=14, warmup=0.0, features=0.5, lr=3e-3, **changes)
        tuned = finetune(pruned, everything, dense=dense, recipe=recipe).last
        result[f"{name} learnt"] = len(tuned.learnt.digests)
        result[name] = {k: v.flatten().tolist() for k, v in tuned.named_parameters()}
    if processes.is_main():
        print(json.dumps(result))
    processes.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
