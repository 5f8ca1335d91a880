"""What stands below the help of each command: examples to copy."""

from __future__ import annotations

DISTILL = """
[bold]Examples[/bold]

  brixel distill --list-recipes

  brixel distill --copy-recipe vitl my.yaml

  brixel distill --recipe recipes/vitl.yaml --dry-run

  brixel distill --recipe vits --images ~/photos --output runs/vits

  brixel distill --recipe vits --set optim.lr=3e-4 --set adapter.kind=deformable

  brixel distill --resume --output runs/vits

  torchrun --nproc-per-node 4 -m brixel_cli distill --recipe vitl
"""

EXTRACT = """
[bold]Examples[/bold]

  brixel extract --input photos --res 448 --checkpoint runs/vits

  brixel extract --input photos --res 448 --checkpoint runs/vits --dry-run

  brixel extract --input "trip/**/*.jpg" --source backbone --backbone vit_small_patch14_dinov2.lvd142m

  brixel extract --input clip.mp4 --every 10 --checkpoint runs/vits --pca 64 --preview

  brixel extract --input photos --res 224 --page features.html --page-sources student,backbone,teacher

  brixel extract --input photos --output out/photos.h5 --shard 3/64

  brixel extract --join 'out/photos.*.h5' --output photos.h5

  brixel extract --checkpoint runs/vits --export student.onnx
"""

PROBE = """
[bold]Examples[/bold]

  brixel probe --list-recipes

  brixel probe --recipe camvid --data data/camvid --checkpoint runs/vits --dry-run

  brixel probe --recipe camvid --data data/camvid --checkpoint runs/vits --quick

  brixel probe --recipe nyuv2 --checkpoint runs/vits --protocol brixel-nyu --res 288x384

  brixel probe --recipe camvid --checkpoint runs/a --checkpoint runs/b --set protocol.lr=1e-3 --per-class

  brixel probe --recipe camvid --source backbone --source student --source features.h5

  brixel probe --recipe camvid --predictions mask2former=DIR --predictions segformer=DIR

  brixel probe --apply runs/probe/camvid/heads/student_seed0.safetensors --input photos
"""

BENCHMARK = """
[bold]Examples[/bold]

  brixel benchmark --compare-highres

  brixel benchmark --compare-highres --models vits,vitb,vitl,vithplus --output runs/family

  brixel benchmark --compare-highres --checkpoint runs/vits --res 128..512 --images ~/photos

  brixel benchmark --models vits,vitb,vitl,vithplus --budget 4GB --dry-run

  brixel benchmark --compare-highres --baseline bilateral.py:upsample

  brixel benchmark --compare-highres --report out

  brixel benchmark --ablate losses,adapter --recipe dinov2_vits --steps 300 --report out
"""

DEMO = """
[bold]Examples[/bold]

  brixel demo

  brixel extract --input demo/photos/held_out --res 112 --backbone-weights demo/dinov2_vits14.safetensors

  brixel distill --recipe demo
"""
