"""Reading videos: seconds and memory for clips of growing length, and what odd files give.

python -m benchmarks.video easy-vqa-repo
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.harness import arguments_of, prepare, print_table, timed, write_results
from transformers_delta_llava.loading import load_repo


def main() -> None:
    """Measure clips, try odd files, print, write."""
    parser = arguments_of("Read videos.")
    parser.add_argument("repo", help="a repo whose tokenizer has <video>, such as a converted examples/easy-vqa")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 10])
    parser.add_argument("--num-frames", type=int, default=32)
    parser.add_argument("--one", type=Path, help="(internal) read this file and print seconds, tokens and peak memory")
    arguments = parser.parse_args()
    prepare(arguments)
    if arguments.one:
        _, processor = load_repo(arguments.repo, "cpu")
        found: dict = {}

        def read() -> None:
            found.update(processor(text="<video>", videos=str(arguments.one), num_frames=arguments.num_frames))

        seconds = timed(read)
        tokens = sum(id == processor.video_token_id for id in found["input_ids"][0])
        print(seconds, tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for minutes in arguments.minutes:
            path = Path(folder) / f"{minutes}.mp4"
            write(path, round(minutes * 60 * 30))
            command = [sys.executable, "-m", "benchmarks.video", arguments.repo, "--one", str(path)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, tokens, peak = map(float, result.stdout.split())
            row = {"minutes at 30 fps": minutes, "frames seen": arguments.num_frames, "visual tokens": tokens}
            rows.append({**row, "seconds": seconds, "peak memory, MB": peak})
        print_table("Clips of 640 x 360", rows)
        _, processor = load_repo(arguments.repo, "cpu")
        odd = []
        for name, path in odd_files(Path(folder)).items():
            try:
                inputs = processor(text="<video>", videos=str(path))
                outcome = f"{len(inputs['pixel_values_videos'])} frames"
            except Exception as error:
                outcome = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            odd.append({"video": name, "outcome": outcome})
    print_table("Odd files", odd)
    print(write_results("video", arguments, rows=rows, odd=odd))


def write(path: Path, frames: int, size: tuple[int, int] = (640, 360), codec: str = "mpeg4", rates=(30,)) -> Path:
    """Colours that move; with several `rates` the time between frames varies."""
    import av

    column = np.linspace(0, 255, size[0], dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = *size, "rgb8" if codec == "gif" else "yuv420p"
        time = 0
        for index in range(frames):
            array = np.broadcast_to(np.roll(column, index)[None, :, None], (size[1], size[0], 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24").reformat(
                format=stream.pix_fmt
            )
            frame.pts = time
            time += 30 // rates[index % len(rates)]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def odd_files(folder: Path) -> dict[str, Path]:
    """Files that users have."""
    clip = write(folder / "clip.mp4", 60)
    cut = folder / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    empty = folder / "empty.mp4"
    empty.write_bytes(b"")
    text = folder / "text.mp4"
    text.write_text("no video")
    return {
        "portrait": write(folder / "tall.mp4", 30, (240, 640)),
        "variable frame rate": write(folder / "variable.mp4", 30, rates=(30, 10, 15)),
        "truncated": cut,
        "one frame": write(folder / "one.mp4", 1),
        "no frames": empty,
        "no video": text,
        "gif": write(folder / "clip.gif", 20, (64, 48), "gif"),
        "webm": write(folder / "clip.webm", 20, (64, 48), "libvpx"),
    }


if __name__ == "__main__":
    main()
