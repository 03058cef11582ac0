"""What every encoding with x264 asks of it."""

from __future__ import annotations

AVX512 = 256  # OpenCV's CPU_AVX512_SKX: the extensions that x264, too, wants all of


def steady_options() -> dict[str, str]:
    """Return libx264's options under which the same frames give the same bytes, whatever the process did before.

    With AVX-512, x264 (seen in core 165) now and then gives the bottom right macroblock another quantiser: its
    macroblock tree is not steady there. With AVX2 it is: the bytes are those that AVX-512 mostly gives, as fast.
    """
    import cv2

    return {"x264-params": "asm=avx2"} if cv2.checkHardwareSupport(AVX512) else {}
