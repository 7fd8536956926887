"""Train one stage on a streamed file and on a larger one in this process; print what each cost.

    python -m tests.support.stream_memory FOLDER ROWS ROWS

prints {"rows", "bytes" of the files, "seconds" of a stage from start to end, "peak_mb" of the process so far, "read":
bytes that the process read during a stage}, each as [smaller, larger]. A stage reads the first tens of MB (a buffer to
shuffle in, and blocks of the JSON reader) whatever the file's size; the smaller file is to be larger than that.
"""

import json
import resource
import sys
import time
from pathlib import Path

from tests.support.train import stage_argv

BLOCK = 1000


def write_rows(path: Path, count: int) -> Path:
    """JSON lines of `count` dialogues; about 200 bytes each."""
    block = []
    for number in range(BLOCK):
        question, answer = f"Question {number}: " + "who won the cup? " * 4, f"team {number % 97}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        block.append(json.dumps({"messages": messages}) + "\n")
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count // BLOCK):
            stream.writelines(block)
    return path


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bytes_read() -> int:
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(io["rchar"])


def train(data: Path, output_dir: Path) -> float:
    """Seconds of one streamed stage of seq, checks included."""
    from swift_cl.cli.sft import check_data
    from swift_cl.training.sft import CLSft

    begun = time.monotonic()
    check_data([str(data)], streaming=True)
    CLSft(stage_argv("seq", "t", output_dir, dataset=str(data), streaming=True)).main()
    return time.monotonic() - begun


def main(folder: Path, counts: list[int]) -> None:
    files = [write_rows(folder / f"{count}.jsonl", count) for count in counts]
    train(files[0], folder / "warm_up")  # imports and first use
    seconds, peaks, read = [], [], []
    for file in files:
        before = bytes_read()
        seconds.append(round(train(file, folder / file.stem), 2))
        read.append(bytes_read() - before)
        peaks.append(round(peak_mb(), 1))
    sizes = [file.stat().st_size for file in files]
    print(json.dumps({"rows": counts, "bytes": sizes, "seconds": seconds, "peak_mb": peaks, "read": read}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(count) for count in sys.argv[2:]])
