"""Hands the build of the kernels to build_backend/; everything else is in pyproject.toml."""

import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Command, Distribution, setup

if int(setuptools.__version__.split(".")[0]) < 77:  # pip does not look at build-system.requires without isolation
    sys.exit(
        f"bregman_cuda: setuptools {setuptools.__version__} is too old to build with: "
        "pip install --upgrade setuptools, or leave out --no-build-isolation"
    )

from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "build_backend"))

from native_build import OUTPUTS, NativeBuild  # noqa: E402
from toolchain import Missing  # noqa: E402


class KernelDistribution(Distribution):
    """Has compiled parts that setuptools does not know how to build, until it shows that none were built."""

    pure = False

    def has_ext_modules(self):
        return not self.pure


class build_ext(Command):
    """Build the kernels that can be built; see build_backend/native_build.py."""

    description = "build the CPU and CUDA kernels"
    user_options = [
        ("build-lib=", "b", "folder that receives the package"),
        ("build-temp=", "t", "folder for object files"),
        ("inplace", "i", "build into the source tree"),
    ]
    boolean_options = ["inplace"]

    def initialize_options(self):
        self.build_lib = None
        self.build_temp = None
        self.inplace = False
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"), ("build_temp", "build_temp"))
        self.inplace = self.inplace or self.editable_mode

    def run(self):
        version = self.distribution.get_version()
        try:
            NativeBuild(ROOT, self._package(), Path(self.build_temp), version).run()
        except Missing as missing:
            sys.exit(f"bregman_cuda: {missing}")

    def get_outputs(self):
        return [str(file) for name in OUTPUTS if (file := self._package() / name).exists()]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []  # MANIFEST.in lists csrc

    def _package(self):
        return (ROOT if self.inplace else Path(self.build_lib).resolve()) / "bregman_cuda"


class bdist_wheel(_bdist_wheel):
    """Tags the wheel by what was built: any Python, as the libraries use no Python C API."""

    def run(self):
        # Modules deleted since an earlier build would be packed again.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        self.run_command("build")
        self.skip_build = True
        package = Path(self.get_finalized_command("build").build_lib, "bregman_cuda")
        self.root_is_pure = self.distribution.pure = not any(package.glob("*.so"))
        super().run()

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(
    distclass=KernelDistribution,
    cmdclass={"build_ext": build_ext, "bdist_wheel": bdist_wheel},
)
