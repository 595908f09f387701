"""Embeddings that were computed once and are kept: in memory, and in a folder if one is given.

    kept = KeptEmbeddings(Path("runs/embeddings"), fingerprint_of(model.state_dict(), settings))
    keys = kept.keys_of_files(paths)           # what a file holds, not how it is called
    kept.add(new_keys, vectors)                # (n, D), written at once
    kept.vectors_of(keys)                      # (len(keys), D)

The folder holds files.json (for each path its size, times and digest, so that files are not read
again) and a subfolder for each model, with one safetensors file for each part that was computed.
Axes: D hidden.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from formats.files import InputError, read_json, write_whole


class KeptEmbeddings:
    """A vector for each key, a digest of what was embedded.

    Raises:
        InputError: where a file in the folder is damaged."""

    def __init__(self, folder: Path | None = None, model: str = ""):
        """Without a folder they are kept in memory only.

        `model` names the model in the folder, see `fingerprint_of`."""
        self.vectors: dict[bytes, torch.Tensor] = {}
        self.folder: Path | None = None
        # Of each path: its state (see `state_of`), and the digest of its content.
        self.files: dict[str, list] = {}
        if folder is None:
            return
        self.folder = folder / model
        self.index = folder / "files.json"
        if self.index.exists():
            self.files = read_json(self.index)
        for path in self.folder.glob("*.safetensors"):
            self.read_part(path)

    def read_part(self, path: Path) -> None:
        try:
            part = load_file(path)
            keys = [bytes(key) for key in part["keys"].numpy()]
            vectors = part["vectors"]
        except (SafetensorError, OSError, KeyError) as error:
            advice = "delete it, its embeddings are computed again"
            raise InputError(f"{path}: damaged ({error}); {advice}") from None
        self.vectors.update(zip(keys, vectors))

    def __contains__(self, key: bytes) -> bool:
        return key in self.vectors

    def vectors_of(self, keys: list[bytes]) -> torch.Tensor:
        """The vectors of these keys -> (len(keys), D)."""
        return torch.stack([self.vectors[key] for key in keys])

    def add(self, keys: list[bytes], vectors: torch.Tensor) -> None:
        """Keep vectors (n, D) under n different keys.

        In a folder they are a file of their own, which is whole or not there."""
        self.vectors.update(zip(keys, vectors))
        if self.folder is None:
            return
        digests = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8)
        digests = digests.view(len(keys), -1)  # (n, 32)

        def write(path: Path) -> None:
            save_file({"keys": digests, "vectors": vectors}, path)

        # Named by its first key: a part that is computed again replaces itself.
        write_whole(self.folder / f"{keys[0].hex()}.safetensors", write)

    def keys_of_files(self, paths: list[Path]) -> list[bytes]:
        """The keys of pictures. Copies of one file have one key."""
        before = dict(self.files)
        progress = tqdm(paths, desc="looking at pictures", delay=2, leave=False)
        keys = [self.key_of_file(path) for path in progress]
        if self.folder is not None and self.files != before:
            write_whole(self.index, json.dumps(self.files))
        return keys

    def key_of_file(self, path: Path) -> bytes:
        """SHA-256 of a file, which is read again only when its state has changed."""
        name = os.path.abspath(path)  # a folder of embeddings may be used from several folders
        try:
            state = state_of(path)
            if self.files.get(name, [])[:-1] != state:
                self.files[name] = [*state, digest_of_file(path)]
        except OSError as error:
            raise InputError(f"{path}: no such image ({error.strerror})") from None
        digest = self.files[name][-1]
        return bytes.fromhex(digest)


def state_of(path: Path) -> list[int]:
    """What changes when a file is written or replaced: its size, two times, its number on the disk.

    The second time is of the last change of any kind: programs can set the first one back (cp -p,
    tar, rsync do), not the second. (On Windows it is the time of creation.) Raises OSError."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def key_of_text(text: str) -> bytes:
    """The key of a caption: the digest of its words. Lone surrogates count as question marks."""
    return hashlib.sha256(b"text " + text.encode("utf-8", "replace")).digest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; read a megabyte at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        block = file.read(2**20)
        while block:
            digest.update(block)
            block = file.read(2**20)
    return digest.hexdigest()


def fingerprint_of(tensors: dict[str, torch.Tensor], settings: list[str]) -> str:
    """A name for all that an embedding depends on besides its input -> 16 hexadecimal digits.

    Args:
        tensors: all of the model's, by name; of at most 4 bytes an element.
        settings: everything else that counts, as text."""
    digest = hashlib.sha256()
    for text in settings:
        digest.update(text.encode())
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        bits = tensor.contiguous().view(integers[tensor.element_size()])
        # Of a matrix the sums along each axis, computed where it is: a fraction of its bytes to be
        # hashed. One axis alone would not tell two rows that change places.
        sums = [bits]
        if bits.ndim > 1:
            sums = [bits.sum(axis, dtype=torch.int64) for axis in range(bits.ndim)]
        for each in sums:
            digest.update(each.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def base_hash(model: nn.Module) -> str:
    """SHA-256 of the names and shapes of a model's tensors, and of the first row of each in bf16.

    The same in whatever layout and shards its files are, in fp32 and in bf16. The model must be as
    its file is: fp16 would round it otherwise."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        if name == "lm_head.weight":
            continue  # where it is tied to the embeddings, it has no name of its own
        digest.update(f"{name} {list(tensor.shape)}".encode())
        row = tensor.detach()[:1].bfloat16().cpu().flatten()
        digest.update(row.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
