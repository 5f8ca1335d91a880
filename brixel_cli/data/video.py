"""Frames of a video, read in order, and written, through PyAV (the extra `video`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from brixel_cli.core.extras import require
from brixel_cli.core.files import replacing
from brixel_cli.errors import BrixelError

VIDEO_EXTENSIONS = frozenset(".avi .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .webm .wmv".split())  # noqa: SIM905
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,ogg,mpeg,mpegts,mpegvideo,m4v,h264,hevc"
"""What FFmpeg may take a file for. It chooses by the contents; playlists, which name other files, are left out."""


class Video:
    """A video file whose frames are asked for in rising order; going back starts it from the beginning.

    Args:
        path: of the file.

    Attributes:
        num_frames: counted over the file's packets; only the first is decoded.
        height, width: of an upright frame in pixels.
        rate: frames a second; 25 where the file does not say.

    Raises:
        UsageError: PyAV is not installed.
        BrixelError: the file holds no video that can be read; the message starts with the reason.
    """

    def __init__(self, path: Path):
        self.path = path
        self._av = _load_av()
        try:
            with self._open() as container:
                stream = container.streams.video[0]
                self.rate = Fraction(stream.average_rate or 25)
                self.num_frames = sum(packet.size > 0 for packet in container.demux(stream))
            first = next(self._decode(), None)
        except Exception as error:  # on damaged files PyAV raises all kinds, EOFError and UnicodeDecodeError among them
            raise BrixelError(f"not a video that can be read: {path}") from error
        if first is None:
            raise BrixelError(f"a video without frames: {path}")
        self.width, self.height = _upright(first).size
        self._frames: Iterator[Any] = iter(())
        self._next = 0
        self._begun = False

    def frame(self, number: int) -> Image.Image:
        """Frame `number`, 0-based, as upright 8-bit RGB.

        Raises:
            BrixelError: the video is damaged there, or ends earlier; the message starts with the reason.
        """
        if not self._begun or number < self._next:
            self._frames, self._next, self._begun = self._decode(), 0, True
        try:
            for frame in self._frames:
                self._next += 1
                if self._next > number:
                    return _upright(frame)
        except Exception as error:  # as above
            raise BrixelError(f"the video is damaged at frame {self._next}: {self.path}") from error
        raise BrixelError(f"the video ends before this frame, after {self._next}: {self.path}")

    def close(self) -> None:
        """Close the file; the next frame that is asked for opens it again."""
        self._frames, self._begun = iter(()), False

    def _open(self) -> Any:
        return self._av.open(str(self.path), options={"format_whitelist": CONTAINERS})

    def _decode(self) -> Iterator[Any]:
        with self._open() as container:
            yield from container.decode(video=0)


def write_video(path: Path, frames: Iterable[tuple[int, Image.Image]], rate: Fraction) -> None:
    """Write an MP4 atomically: H.264, or MPEG-4 Part 2 where FFmpeg was built without it.

    Args:
        path: of the file.
        frames: at least one, of one size; each with its number in the source, rising. It is shown until the next one's
            time. An odd last row or column of pixels is left out, as the codecs demand.
        rate: frames a second of the source.

    Raises:
        UsageError: PyAV is not installed.
        BrixelError: the file cannot be written.
    """
    av = _load_av()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with replacing(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = None
        for number, image in frames:
            if stream is None:
                stream = container.add_stream(codec, rate=rate)
                stream.width, stream.height, stream.pix_fmt = image.width // 2 * 2, image.height // 2 * 2, "yuv420p"
                stream.codec_context.time_base = 1 / rate
            frame = av.VideoFrame.from_image(image.convert("RGB").crop((0, 0, stream.width, stream.height)))
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode())


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    turn = round(frame.rotation)  # in degrees, counter-clockwise: of telephones held upright
    return image.rotate(turn, expand=True) if turn else image


def _load_av() -> Any:
    require("video", "A video")
    import av

    return av
