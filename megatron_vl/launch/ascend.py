"""What an Ascend NPU needs before a run can start on it, and a sentence for each that is missing.

Files, variables and the versions of packages are looked at, never torch: where torch_npu does not
find CANN, `import torch` itself fails. A machine without torch_npu is asked nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_vl.errors import InputError, shown

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
_ON_CPU = f"set {VISIBLE}= to run on the CPU"  # empty
# torch itself imports torch_npu unless it is told not to.
_WITHOUT_IT = f"set TORCH_DEVICE_BACKEND_AUTOLOAD=0 and {VISIBLE}= to run on the CPU"
DRIVER = "/dev/davinci_manager"
_BUFFER = "HCCL_BUFFSIZE"
_BUFFER_MB = 200  # of HCCL_BUFFSIZE where it is not set; a communicator holds two
_P2P_MB = 20  # of P2P_HCCL_BUFFSIZE
# Rows differ in their images, so in the shapes that kernels are kept for; and ranks meet late, some
# having compiled kernels that others found.
VARIABLES = {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True", "ACLNN_CACHE_LIMIT": "100000",
             "HCCL_CONNECT_TIMEOUT": "1200"}
# torch_npu -> the CANN it was made for: the table of Ascend/pytorch's COMPATIBILITY.
CANN_OF = {
    "2.8.0": "8.3.RC1", "2.8.0.post2": "8.5.0", "2.8.0.post4": "9.0.0", "2.9.0": "8.5.0",
    "2.9.0.post2": "9.0.0", "2.9.0.post6": "9.1.0", "2.10.0.post4": "9.1.0", "2.11.0": "9.1.0",
    "2.12.0": "9.1.0", "2.14.0": "9.1.0",
}
# Set by CANN's set_env.sh, with what it puts before the paths of programs and libraries.
_HOMES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
_PATHS = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
_SET_ENV = ("usr/local/Ascend/ascend-toolkit/set_env.sh", "usr/local/Ascend/cann/set_env.sh")
# That of a rank's environment which decides how it runs; a node's own address is no other's.
_PASSED = re.compile(
    r"HCCL_(?!IF_IP$)\w+|P2P_HCCL_BUFFSIZE|ASCEND_\w+|PYTORCH_NPU_ALLOC_CONF|TASK_QUEUE_ENABLE"
    r"|COMBINED_ENABLE|CPU_AFFINITY_CONF|NPU_ASD_ENABLE|ACLNN_CACHE_LIMIT|INF_NAN_MODE_ENABLE"
    r"|MULTI_STREAM_MEMORY_REUSE|CLOSE_MATMUL_K_SHIFT"
)
_ITS_LIBRARY = re.compile(r"torch_npu|lib(hccl|ascend|acl|ge_|graph)\w*\.so")


def package_version(package: str) -> str | None:
    """An installed package's version without what follows a plus; None where there is none."""
    from importlib import metadata  # which takes longer than the commands that ask nothing of it

    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def is_wanted(environ: Mapping[str, str]) -> bool:
    """Whether torch_npu is installed, and its devices are not hidden."""
    return environ.get(VISIBLE) != "" and package_version("torch_npu") is not None


def check_visible(environ: Mapping[str, str]) -> None:
    """Raises InputError: ASCEND_RT_VISIBLE_DEVICES, of which CANN would read a part in silence."""
    text = environ.get(VISIBLE, "")
    if not text:
        return
    words = text.split(",")
    numbers = [int(one) for one in words if re.fullmatch(r"\d{1,4}", one, re.ASCII)]
    if len(numbers) < len(words) or numbers != sorted(set(numbers)):
        raise InputError(
            f"{VISIBLE} is {shown(repr(text))}; CANN reads ascending numbers between commas, "
            f"without spaces, and stops at anything else: write them as 0,1,2,3."
        )


def check_start(environ: Mapping[str, str]) -> list[str]:
    """Whether what is installed for NPUs fits together; returns what is only worth a line.

    Raises:
        InputError: torch and torch_npu do not fit, or two variables exclude each other.
    """
    if not is_wanted(environ):
        return []
    both = ("PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF")
    if all(environ.get(name) for name in both):
        raise InputError(
            f"{both[0]} and {both[1]} are both set, which torch_npu refuses; unset one of them."
        )
    if unlike := _unlike_torch():
        raise InputError(unlike)
    home = _cann_home(environ)
    wanted, cann = CANN_OF.get(package_version("torch_npu")), home and cann_version(home)
    if not wanted or not cann or cann.upper().startswith(wanted.upper()):
        return []
    return [f"torch_npu {package_version('torch_npu')} was made for CANN {wanted} and {home} is "
            f"CANN {cann}; if operators fail, install the matching one."]


def why_not_imported(
    error: BaseException, environ: Mapping[str, str], root: Path = Path("/")
) -> str | None:
    """What is missing where importing torch, or torch_npu, raised `error`; None: it is another's.
    """
    said = [str(one) for one in _chain(error)]
    if not any(
        text.startswith("Failed to load the backend extension: torch_npu")
        or (isinstance(one, ImportError) and _ITS_LIBRARY.search(text))
        for one, text in zip(_chain(error), said, strict=True)
    ) or package_version("torch_npu") is None:
        return None
    if unlike := _unlike_torch():
        return f"{unlike[:-1]}, or {_WITHOUT_IT}."
    library = next((found[0] for text in said if (found := re.search(r"lib\w+\.so", text))), "")
    begins = f"torch_npu {package_version('torch_npu')} is installed but cannot load"
    if library.startswith(("libascend_hal", "libdrv")):
        return (f"{begins} {library} of the driver; install the driver, in a container mount "
                f"/usr/local/Ascend/driver (docs/ascend.md has the line), or {_WITHOUT_IT}.")
    if _cann_home(environ) is None:
        script = next((root / one for one in _SET_ENV if (root / one).is_file()), None)
        mend = f"source {script} in this shell" if script else (
            f"install CANN {CANN_OF.get(package_version('torch_npu'), '')}".rstrip()
            + " and source its set_env.sh")
        return f"{begins} CANN ({library or said[-1]}); {mend}, or {_WITHOUT_IT}."
    return (f"{begins} {library or 'CANN'} from {_cann_home(environ)} "
            f"({said[-1].splitlines()[0] if said[-1] else type(error).__name__}); install the CANN "
            f"that fits, or {_WITHOUT_IT}.")


def why_no_device(environ: Mapping[str, str], root: Path = Path("/")) -> str:
    """What is missing where torch_npu was imported and finds no NPU."""
    begins = f"torch_npu {package_version('torch_npu')} is installed but sees no NPU"
    if not any((root / "dev").glob("davinci[0-9]*")):
        return (f"{begins}: there is no /dev/davinci0; install the driver, give a container its "
                f"devices (docs/ascend.md has the line), or {_ON_CPU}.")
    missing = [name for name in ("davinci_manager", "devmm_svm", "hisi_hdc")
               if not (root / "dev" / name).exists()]
    if missing:
        names = " and no ".join(f"/dev/{name}" for name in missing)
        return f"{begins}: there is no {names}; give a container its devices, or {_ON_CPU}."
    return (f"{begins}, though its devices are there; see what npu-smi info says, and whether "
            f"{VISIBLE} ({shown(repr(environ.get(VISIBLE, '')))}) names some of them.")


def cann_version(home: str | Path) -> str | None:
    """Version of the CANN toolkit in `home`, as `8.5.0`; None where its files do not say.

    As `version.cfg` and `ascend_toolkit_install.info` of CANN 8 and 9 have it.
    """
    for path, pattern in (
        *((path, r"^version=(\S+)")
          for path in sorted(Path(home).glob("*-linux/ascend_toolkit_install.info"))),
        (Path(home, "version.cfg"), r"^toolkit_running_version=\[[^:\]]*:(?:CANN-)?([^\]]+)\]"),
    ):
        try:
            found = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"), re.M)
        except OSError:
            continue
        if found:
            return found[1]
    return None


def buffers(communicators: int, neighbours: int, environ: Mapping[str, str]) -> str:
    """What HCCL holds beside the model of so many communicators and pipeline neighbours, in words.

    A communicator has one buffer to send and one to receive: CANN's page on HCCL_BUFFSIZE.

    Raises:
        InputError: HCCL_BUFFSIZE is no size.
    """
    sizes = []
    for name, usual, least in ((_BUFFER, _BUFFER_MB, 1), ("P2P_HCCL_BUFFSIZE", _P2P_MB, 0)):
        text = environ.get(name, "").strip() or str(usual)
        if not re.fullmatch(r"\d{1,6}", text, re.ASCII) or int(text) < least:
            raise InputError(
                f"{name} is {shown(repr(text))}; give a whole number of MB of at least {least}."
            )
        sizes.append(int(text))
    size, p2p = sizes
    total = 2 * (communicators * size + neighbours * p2p)
    return (
        f"HCCL's buffers take up to {total:,} MB of a rank's device memory, beside the model: "
        f"{communicators} communicators of 2 x {size} MB ({_BUFFER})"
        + (f" and {neighbours} of neighbouring stages of 2 x {p2p} MB" if neighbours else "")
        + f"; a lower {_BUFFER} takes less."
    )


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of CANN, HCCL and torch_npu that ranks on other hosts need as well."""
    names = [name for name in environ if _PASSED.fullmatch(name)]
    names += [name for name in _PATHS if name in environ and _cann_home(environ)]
    return {name: environ[name] for name in names}


def _cann_home(environ: Mapping[str, str]) -> str | None:
    return next((environ[name] for name in _HOMES if environ.get(name)), None)


def _unlike_torch() -> str:
    """A sentence where torch and torch_npu are of different versions; else empty."""
    torch, npu = package_version("torch"), package_version("torch_npu")
    if not torch or not npu or "." not in npu or torch.split(".")[:2] == npu.split(".")[:2]:
        return ""
    fitting = ".".join(npu.split(".")[:3])
    return (f"torch {torch} and torch_npu {npu} do not fit together; install torch {fitting}, or "
            f"the torch_npu of torch {torch}.")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
