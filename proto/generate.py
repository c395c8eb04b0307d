"""Compiles the protos into `antefix/v1`: python proto/generate.py. The script needs grpcio-tools, which every build
brings.
"""

from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).parents[1]


def main() -> None:
    protos = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "proto").rglob("*.proto"))
    # The second has protobuf's own files.
    include = [f"-I{ROOT / 'proto'}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    flags = [*include, f"--python_out={ROOT}", f"--pyi_out={ROOT}", f"--grpc_python_out={ROOT}"]
    if protoc.main(["protoc", *flags, *(str(ROOT / path) for path in protos)]):
        raise SystemExit("protoc failed")
    (ROOT / "antefix" / "v1" / "__init__.py").write_text('"""Generated from proto/antefix/v1 by every build."""\n')


if __name__ == "__main__":
    main()
