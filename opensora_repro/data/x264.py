"""What every encoding with x264 asks of it."""

from __future__ import annotations

AVX512 = 256  # OpenCV's CPU_AVX512_SKX: the extensions that x264, too, wants all of


def steady_options(*params: str) -> dict[str, str]:
    """Return libx264's options: `params`, and those under which the same frames always give the same bytes.

    With AVX-512, x264 (seen in core 165) now and then gives the bottom right macroblock another quantiser: its
    macroblock tree is not steady there. With AVX2 it is: the bytes are those that AVX-512 mostly gives, as fast.
    """
    import cv2

    wanted = [*params, "asm=avx2"] if cv2.checkHardwareSupport(AVX512) else params
    return {"x264-params": ":".join(wanted)} if wanted else {}
