"""WebDataset shards, local or behind URLs, as a source of encoded images (read once, by tools.pack)."""

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

from datasets.manifest import IMAGE_ENDINGS
from util.errors import InputError


def is_webdataset(data_path: str) -> bool:
    return data_path.endswith((".tar", ".tar}")) or "::" in data_path or data_path.startswith("pipe:")


class WebShards:
    """Shards of `data_path`: braces give ranges, `::` joins lists, as the webdataset library has it.

    Raises:
        InputError: the library is missing, or a local file does not exist.
    """

    unit = "shards"

    def __init__(self, data_path: str):
        try:
            from webdataset.shardlists import expand_urls
        except ImportError:
            raise InputError(f"{data_path} needs the webdataset library: pip install webdataset") from None
        self.urls = expand_urls(data_path)
        missing = [url for url in self.urls if ":" not in url and not Path(url).is_file()]
        if missing:
            raise InputError(f"{len(missing)} of {len(self.urls)} shards do not exist, first {missing[0]}")
        self.total = len(self.urls)

    def __len__(self) -> int:
        return len(self.urls)

    def sha256(self) -> str:
        names = [url.rsplit("/", 1)[-1] for url in self.urls]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def items(self, shard: int) -> Iterator[tuple[str, bytes]]:
        """(shard/key.ending, encoded image) of every sample that has an image.

        Raises:
            InputError: the shard cannot be opened, or ends early.
        """
        import webdataset

        url = self.urls[shard]
        if Path(url).is_file() and not _has_end_mark(Path(url)):
            # Python's tarfile takes a cut between two members for the end of the archive
            raise InputError(f"shard {url} is cut off (no end-of-archive mark): copy or download it again")
        stem = url.rsplit("/", 1)[-1].removesuffix(".tar")
        samples = webdataset.WebDataset(url, shardshuffle=False, empty_check=False, handler=_reraise)
        try:
            for sample in samples:
                for ending in IMAGE_ENDINGS:
                    if ending[1:] in sample:
                        yield f"{stem}/{sample['__key__']}{ending}", sample[ending[1:]]
                        break
        except (OSError, EOFError, tarfile.TarError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"shard {url} could not be read to its end ({type(error).__name__}: {reason}): run the same "
                "command again when it can; finished shards are kept"
            ) from error


def _has_end_mark(file: Path) -> bool:
    with open(file, "rb") as opened:
        opened.seek(-min(1024, file.stat().st_size), 2)
        return not any(opened.read())


def _reraise(error: Exception) -> bool:
    raise error
