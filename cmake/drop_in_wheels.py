"""Writes the wheels of the drop-ins: drop_in_wheels.py FOLDER.

Each folder in python/flashtile/integrations/drop_in holds modules and the metadata of their
distribution, as an installer lays them out; a wheel is that folder, zipped, with a list of hashes.
"""

import base64
import hashlib
import sys
import zipfile
from pathlib import Path

DROP_INS = Path(__file__).resolve().parents[1] / "python/flashtile/integrations/drop_in"
TIME = (1980, 1, 1, 0, 0, 0)  # the same bytes from the same files


def row(name: str, content: bytes) -> str:
    """A line of RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"


def write_wheel(source: Path, folder: Path) -> Path:
    """Zips one drop-in; returns the wheel."""
    (info,) = source.glob("*.dist-info")
    files = {
        path.relative_to(source).as_posix(): path.read_bytes()
        for path in sorted(source.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    record = f"{info.name}/RECORD"
    lines = "".join(row(name, content) for name, content in files.items()) + f"{record},,\n"
    wheel = folder / f"{info.name.removesuffix('.dist-info')}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (*files.items(), (record, lines.encode())):
            entry = zipfile.ZipInfo(name, TIME)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    return wheel


def main() -> None:
    """All of them."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted(DROP_INS.iterdir()):
        print(write_wheel(source, folder))


if __name__ == "__main__":
    main()
