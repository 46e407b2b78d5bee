"""config.data: the source of clips (`vdit/data/sources.py`), and their shape."""

from ml_collections import ConfigDict

from vdit.config import default, shared
from vdit.data import sources


def fields() -> ConfigDict:
    """config.data."""
    data = ConfigDict()
    # world: physics of single bodies and pairs; shots: the same with cuts; playground: animated
    # characters, cameras, ramps and towers; folder: video files with captions; webdataset: tar
    # shards of these; tfds: a prepared TFDS video set
    data.source = "world"
    # folder: directory of videos; tfds: data_dir, the directory above SET; webdataset: a file, a
    # directory or a pattern (*, ?, {000..127}, {a,b})
    data.path = ""
    data.name = ""  # tfds: SET[/CONFIG][:VERSION]; empty: the only set in data.path
    data.native_fps = 0.0  # tfds: frame rate of the stored videos; 0: "fps" in metadata.json
    data.template = sources.TEMPLATE  # tfds: caption of a class label
    # tfds: feature with the videos; empty: detected by type. webdataset: file ending of the videos;
    # empty: the sample's only film, else its only picture
    data.video_field = ""
    # tfds: Text or ClassLabel feature; empty: the only one, or by name. webdataset: file ending of
    # the captions, or field of the .json; empty: .txt, else "caption" or "text" of the .json
    data.caption_field = ""
    # Class label, for dit.paper.classes. world: shape, colour, size or motion of a clip's one body;
    # films and tfds: "caption", with a class for each distinct caption (tfds: each ClassLabel)
    data.label = ""
    data.frames = 17  # frames per clip: 1 + k * vae.patch[0]
    data.size = (32, 32)  # height, width in pixels
    data.fps = 10.0  # frames per second
    data.objects = (1, 2)  # world, shots, playground (up to 6): fewest and most bodies per clip
    data.shots = (1, 1)  # shots, playground (up to 4): fewest and most shots per clip
    # playground: longest captions. 0: a clause, 1: a sentence, 2: with events, 3: hundreds of words
    data.detail = 3
    data.stride = 1.0  # not of worlds: seconds between the starts of clips from one video
    # folder, webdataset: refuse it for a film that cannot be read, a wrong row or a missing caption,
    # instead of skipping these
    data.strict = False
    # Not of worlds: share of the clips held out; 0 (not tfds): none, the training clips are scored
    data.heldout = 0.1
    data.threads = 1  # reader threads
    # Clip shapes (frames, height, width, fps) for the denoiser, taken in turn and packed into rows
    # of equal length; empty: the shape above. Videos of a folder take those near their aspect.
    data.shapes = ()
    return data


def check(config: ConfigDict) -> None:
    """Checks the shape of clips, and the fields of the source."""
    shared.check_positive(config, "data.fps")
    shared.check_sizes(config, {"data.size": 2, "data.objects": 2, "data.shots": 2})
    sources.check(config, default())


SECTION = shared.Section(fields, check, free=("threads", "path"))  # files count by their content
