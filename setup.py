"""Generates `antefix/v1` from `proto/` before anything is packaged; the generated code is never committed."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildProto(build_py):
    """Compile the protos, then collect Python files, so that the new ones are among them."""

    def run(self) -> None:
        compile_protos()
        super().run()


def compile_protos() -> None:
    from grpc_tools import protoc

    protos = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "proto").rglob("*.proto"))
    flags = ["-Iproto", "--python_out=.", "--pyi_out=.", "--grpc_python_out=."]
    if protoc.main(["protoc", *flags, *protos]):
        raise SystemExit("protoc failed")
    (ROOT / "antefix" / "v1" / "__init__.py").write_text('"""Generated from proto/antefix/v1 at install."""\n')


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildProto})
