"""config.data: the source of clips (`vdit/data/sources.py`), and their shape."""

from ml_collections import ConfigDict

from vdit.config import default, shared
from vdit.data import sources


def fields() -> ConfigDict:
    """config.data."""
    data = ConfigDict()
    # world: physics of single bodies and pairs; shots: the same with cuts; playground: animated
    # characters, cameras, ramps and towers; folder: video files with captions; webdataset: tar
    # shards of these; parquet: tables of these; datasets: a folder that Hugging Face's datasets
    # saved; mixture: several of these; tfds: a prepared TFDS video set
    data.source = "world"
    # folder: directory of videos; tfds: data_dir, the directory above SET; webdataset, parquet: a
    # file, a directory of files or a pattern (*, ?, {000..127}, {a,b}); datasets: the directory
    data.path = ""
    # mixture: (source, path, share) of each source of films, or (source, path, share, frames) for
    # clips of another length, such as 1 for pictures, which the denoiser alone has, at data.shapes
    data.mixture = ()
    # tfds: SET[/CONFIG][:VERSION]; empty: the only set in data.path. datasets: split; empty: train
    data.name = ""
    data.native_fps = 0.0  # tfds: frame rate of the stored videos; 0: "fps" in metadata.json
    data.template = sources.TEMPLATE  # tfds: caption of a class label
    # Feature (tfds) or column (parquet, datasets) of the videos; empty: detected by name and type.
    # webdataset: their file ending; empty: the sample's only film, else its only picture
    data.video_field = ""
    # Feature or column of the captions; empty: detected by name and type. webdataset: their file
    # ending, or field of the .json; empty: .txt, else "caption" or "text" of the .json
    data.caption_field = ""
    # parquet, datasets: rows to keep, as pyarrow writes conditions: "[('seconds', '>', 2)]"
    data.filter = ""
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
    # Not of worlds and tfds: refuse a set for a film that cannot be read, a wrong row or a missing
    # caption, instead of skipping these
    data.strict = False
    # Share of the clips held out, not of worlds; 0 (not tfds): none, the training clips are scored
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


# Files count by their content.
SECTION = shared.Section(fields, check, free=("threads", "path", "mixture"))
