"""Cases of tars and parquet files."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from random import Random

from archives import contents, write_parquet, write_tar

from hostile import damage
from hostile.cases import FORGED, Case
from hostile.input_cases import extract_alone
from hostile.world import World, contents_of_features


def archive(world: World, rng: Random, place: Path) -> Case:
    """A damaged tar or parquet file beside a good one."""
    ending, photos = rng.choice((".tar", ".parquet")), contents(world.photos)
    good, bad = (place / "work" / f"{name}{ending}" for name in ("good", "bad"))
    for path in (good, bad):
        if ending == ".tar":
            write_tar(path, photos)
        else:
            write_parquet(path, [{"bytes": data, "path": name} for name, data in photos.items()])
    if rng.random() < 0.3 and ending == ".tar":
        odd = (
            "../../outside/precious.png",
            "/etc/passwd.png",
            "a" * 3000 + ".png",
            f"a\n{FORGED}.png",
            "\x1b[2J.png",
            "0.png",
            ".png",
            "a/../b.png",
        )
        names = [rng.choice((*odd, *photos)) for _ in photos]
        with tarfile.open(bad, "w") as tar:
            for name, data in zip(names, photos.values(), strict=True):
                info = tarfile.TarInfo(name)
                info.size, info.type = (
                    len(data),
                    rng.choice((tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.LNKTYPE)),
                )
                info.linkname = "../../outside/precious.txt"
                tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
        what = f"members {names}"[:150]
    else:
        what = rng.choice((damage.any_bytes, damage.in_head, damage.other_kind))(rng, bad)
    output = place / "work" / "out.h5"
    arguments = extract_alone(world, good, output, "--input", str(bad))

    def check() -> str | None:
        if not output.exists():
            return None
        found = contents_of_features(output)["maps"]
        wrong = [name for name in photos if found.get(f"good{ending}/{name}") != world.alone[name]]
        return f"other maps of {', '.join(wrong)}" if wrong else None

    return Case(f"{ending}: {what}", arguments, always=check, output=("work/out.h5",))
