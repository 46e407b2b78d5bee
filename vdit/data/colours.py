"""Colours of foreign pictures as those of SDR: HDR, wide gamuts, ICC profiles, untagged matrices.

Numbers of transfer functions, primaries and matrices are those of ISO/IEC 23091-2.
"""

import functools
import io
from typing import Any

import numpy as np

HDR = PQ, HLG = 16, 18
UNKNOWN, BT2020 = 2, 9
DISPLAY_P3 = ((1.2249, -0.2247, 0.0), (-0.042, 1.0419, 0.0), (-0.0197, -0.0786, 1.0979))
TO_BT709 = {
    BT2020: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    11: DISPLAY_P3,  # of cinemas
    12: DISPLAY_P3,
}


def treatment(frame: Any) -> str:
    """What a frame needs, as names of `TREATED`."""
    needs = {
        "hdr": frame.color_trc in HDR,
        "wide": frame.color_trc not in HDR and beyond_sdr(frame),
        "untagged": frame.color_trc not in HDR and matrix(frame),
        "interlaced": frame.interlaced_frame,
    }
    return " ".join(name for name, need in needs.items() if need)


def matrix(frame: Any) -> dict[str, int]:
    """The reformatter's argument for a YUV frame that does not say by which matrix it is read."""
    from av.video.reformatter import Colorspace

    if frame.colorspace != UNKNOWN or frame.format.is_rgb or len(frame.format.components) < 3:
        return {}
    if frame.color_trc in HDR:
        return {"src_colorspace": Colorspace.BT2020}
    large = frame.width >= 1280 or frame.height > 576
    return {"src_colorspace": Colorspace.ITU709} if large else {}


def beyond_sdr(frame: Any) -> tuple[int, int] | None:
    """Transfer function and primaries of frames that `to_sdr` maps."""
    transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
    if transfer in HDR and primaries == UNKNOWN:
        primaries = BT2020
    return (transfer, primaries) if transfer in HDR or primaries in TO_BT709 else None


@functools.cache
def _light(transfer: int) -> np.ndarray:
    """Linear light (1: SDR's white, which has 203 cd/m2 by BT.2408; of HLG that of the scene) of
    every 16-bit value."""
    values = np.linspace(0, 1, 2**16)
    if transfer == PQ:  # SMPTE ST 2084
        root = values ** (32 / 2523)
        light = np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)
        light = light ** (8192 / 1305) * 10000 / 203
    elif transfer == HLG:  # BT.2100
        light = (np.exp((values - 0.55991073) / 0.17883277) + 0.28466892) / 12
        light = np.where(values <= 0.5, values**2 / 3, light)
    else:
        light = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


def to_sdr(signal_HW3: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Colours of a 16-bit signal as those of sRGB, uint8 (see `beyond_sdr`).

    Up to nine tenths of SDR's white tones stay, and brighter ones approach it, with the ratios of
    the channels kept; colours outside of BT.709 are clipped.
    """
    light_HW3 = _light(transfer if transfer in HDR else 0)[signal_HW3]
    if transfer == HLG:  # shown with a peak of 1000 cd/m2 and its gamma of 1.2
        luminance = light_HW3 @ np.array([0.2627, 0.678, 0.0593], np.float32)
        light_HW3 = light_HW3 * luminance[..., None] ** 0.2 * (1000 / 203)
    light_HW3 = light_HW3 @ np.array(TO_BT709.get(primaries, np.eye(3)), np.float32).T
    if transfer in HDR:
        peak = np.maximum(light_HW3.max(-1, keepdims=True), 1e-6)
        rolled = 0.9 + 0.1 * -np.expm1(np.minimum(9 - 10 * peak, 0))
        light_HW3 = light_HW3 * np.where(peak > 0.9, rolled / peak, 1)
    light_HW3 = np.clip(light_HW3, 0, 1)
    low = light_HW3 <= 0.0031308
    shown = np.where(low, 12.92 * light_HW3, 1.055 * light_HW3 ** (1 / 2.4) - 0.055)
    return (255 * shown + 0.5).astype(np.uint8)


def in_srgb(image: Any) -> Any:
    """A picture in sRGB's colours, if it has an ICC profile of others."""
    from PIL import ImageCms

    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info.get("icc_profile") or b""))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return image
        mode = "RGBA" if image.has_transparency_data else "RGB"
        if image.mode not in ("L", "CMYK"):
            image = image.convert(mode)
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, profile, srgb, outputMode=mode) or image
    except (ImageCms.PyCMSError, OSError):  # none, or one that fits no picture
        return image
