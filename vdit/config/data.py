"""config.data: what clips are read or simulated."""

from ml_collections import ConfigDict

from vdit.config import default, shared
from vdit.data import sources


def fields() -> ConfigDict:
    """config.data."""
    data = ConfigDict()
    # world: simulated physics; shots: the same in several shots; playground: characters with
    # materials and faces, cameras, things to climb and topple; folder: videos with captions; tfds:
    # a prepared TFDS video set
    data.source = "world"
    data.path = ""  # folder: where the files are; tfds: the data_dir, the folder above SET
    data.name = ""  # tfds: SET[/CONFIG][:VERSION]; empty: the only set there
    data.native_fps = 0.0  # tfds: rate of the set's own frames; 0: "fps" of its metadata.json
    data.template = sources.TEMPLATE  # tfds: caption of a set that has classes for captions
    data.video_field = ""  # tfds: the feature that holds the videos; empty: found by its type
    data.caption_field = ""  # tfds: a Text or ClassLabel; empty: the only one, or by its name
    # What a clip's class is, for dit.paper.classes. world: shape, colour, size or motion of its one
    # body; folder, tfds: "caption", each different one (of tfds the ClassLabel) is a class
    data.label = ""
    data.frames = 17  # frames of a clip: 1 + k * the VAE's temporal patch
    data.size = (32, 32)  # height, width in pixels
    data.fps = 10.0  # frames a second
    data.objects = (1, 2)  # world, shots, playground (up to 6): least and most bodies in a clip
    data.shots = (1, 1)  # shots, playground (to (1, 4)): least and most shots in a clip
    # playground: captions go up to 0 a clause, 1 a sentence, 2 with events, 3 hundreds of words
    data.detail = 3
    data.stride = 1.0  # folder, tfds: seconds between the starts of clips cut from one film
    data.threads = 1  # threads that read ahead
    # What the DiT learns from, where that is not clips of the above: rows of (frames, height,
    # width, fps), which the clips have in turn and which are packed into rows of one length. Films
    # of a folder have only those that suit their aspect.
    data.shapes = ()
    return data


def check(config: ConfigDict) -> None:
    """Refuses values that are not possible, and fields that the source does not take."""
    shared.check_positive(config, "data.fps")
    shared.check_sizes(config, {"data.size": 2, "data.objects": 2, "data.shots": 2})
    sources.check(config, default())


SECTION = shared.Section(fields, check, free=("threads",))
