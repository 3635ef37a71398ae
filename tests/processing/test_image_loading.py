"""Images of every kind and from every source become the same 8-bit RGB pixels, or are refused by their number."""

import base64
import contextlib
import http.server
import io
import socket
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from transformers_delta_llava.processing import image_utils_delta_llava, load_chat_template


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode_of_pillow_becomes_rgb(raw: Any, make_image: Any, mode: str) -> None:
    image = make_image(9, 9)
    through = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
    given = image.convert(through).convert(mode) if through else image.convert(mode)
    opaque = {"LA": "L", "La": "L", "PA": "P", "RGBa": "RGB"}.get(mode, mode)
    expected = np.asarray(image.convert(opaque).convert("RGB"))
    np.testing.assert_array_equal(raw(given), expected)


def test_transparency_is_dropped_as_convert_does(raw: Any, make_image: Any, recwarn: Any) -> None:
    image = make_image(9, 9)
    see_through = image.copy()
    see_through.putalpha(Image.new("L", image.size, 7))
    np.testing.assert_array_equal(raw(see_through), np.asarray(image))
    palette = image.quantize(16)
    colours = np.asarray(palette.convert("RGB"))
    for transparency in (3, bytes(range(16))):
        palette.info["transparency"] = transparency
        np.testing.assert_array_equal(raw(palette), colours)
    assert not [warning for warning in recwarn if "Transparency" in str(warning.message)]


SIXTEEN_BITS = np.arange(0, 65536, 257 * 16, dtype=np.uint16).reshape(4, 4)
EIGHT_BITS = (SIXTEEN_BITS // 257).astype(np.uint8)


def test_sixteen_bits_are_scaled_not_clipped(raw: Any, tmp_path: Path) -> None:
    images = [Image.fromarray(SIXTEEN_BITS), Image.fromarray(SIXTEEN_BITS.astype(np.int32))]
    assert [image.mode for image in images] == ["I;16", "I"]
    images[0].save(tmp_path / "grey.png")
    for image in (*images, tmp_path / "grey.png", str(tmp_path / "grey.png")):
        np.testing.assert_array_equal(raw(image), np.repeat(EIGHT_BITS[..., None], 3, axis=2))


def test_images_of_floats_are_scaled_not_clipped(raw: Any) -> None:
    for scale in (1 / 255, 1.0):
        image = Image.fromarray(EIGHT_BITS.astype(np.float32) * np.float32(scale))
        np.testing.assert_array_equal(raw(image)[..., 1], EIGHT_BITS)
    elsewhere = Image.fromarray(EIGHT_BITS.astype(np.float32) * 100 - 3000)
    ratio = (EIGHT_BITS.astype(np.float64) - EIGHT_BITS.min()) / (EIGHT_BITS.max() - EIGHT_BITS.min())
    np.testing.assert_array_equal(raw(elsewhere)[..., 0], np.rint(ratio * 255).astype(np.uint8))
    assert (raw(Image.new("F", (3, 3), -5.0)) == 0).all()
    assert (raw(Image.new("I", (3, 3), 10**6)) == 0).all()
    for huge in (3e38, -3e38):  # to which nothing can be added
        assert (raw(Image.new("F", (3, 3), huge)) == 0).all()
    far = np.array([[-3e38, 3e38]], np.float32)
    np.testing.assert_array_equal(raw(Image.fromarray(far), do_pad=False)[0, :, 0], [0, 255])
    farther = np.array([[-1.7e308, 0, 1.7e308]])
    np.testing.assert_array_equal(image_utils_delta_llava._to_bytes(farther, stretch=True), [[0, 128, 255]])


@pytest.mark.parametrize("kind", ["image", "path", "jpeg path"])
def test_images_are_turned_upright(raw: Any, make_image: Any, tmp_path: Path, kind: str) -> None:
    image = make_image(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise to show
    path = tmp_path / ("turned.jpg" if kind == "jpeg path" else "turned.png")
    image.save(path, exif=exif)
    stored = np.asarray(Image.open(path))
    shown = raw(Image.open(path) if kind == "image" else path)
    np.testing.assert_array_equal(shown, np.rot90(stored, -1))


ARRAYS = {
    "height, width, channels": lambda a: a,
    "channels, height, width": lambda a: a.transpose(2, 0, 1),
    "tensor": lambda a: torch.from_numpy(a.transpose(2, 0, 1).copy()),
    "tensor, channels last": torch.from_numpy,
    "floats 0..1": lambda a: a / 255,
    "floats 0..255": lambda a: a.astype(np.float32),
    "bfloat16 tensor": lambda a: torch.from_numpy(a).to(torch.bfloat16),
    "tensor with gradient": lambda a: torch.from_numpy(a / 255).requires_grad_(),
    "integers": lambda a: a.astype(np.int64),
    "short integers": lambda a: a.astype(np.int16),
    "16 bits": lambda a: a.astype(np.uint16) * 257,
    "16 bits in 32": lambda a: a.astype(np.int32) * 257,
    "big-endian 16 bits": lambda a: (a.astype(np.uint16) * 257).astype(">u2"),
    "four channels": lambda a: np.concatenate([a, a[..., :1]], axis=2),
    "not contiguous": lambda a: a[:, ::-1][:, ::-1],
    "batch of one": lambda a: a[None],
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_and_tensors_are_taken_as_they_are_laid_out(raw: Any, make_image: Any, kind: str) -> None:
    array = np.array(make_image(9, 9))
    array[0, 0], array[0, 1] = 0, 255
    np.testing.assert_array_equal(raw(ARRAYS[kind](array)), array)


@pytest.mark.parametrize("shape", [(9, 9), (9, 9, 1), (1, 9, 9)])
def test_grey_arrays_become_rgb(raw: Any, make_image: Any, shape: tuple[int, ...]) -> None:
    grey = np.asarray(make_image(9, 9).convert("L"))
    for array in (grey.reshape(shape), torch.from_numpy(grey.copy()).reshape(shape)):
        np.testing.assert_array_equal(raw(array), np.repeat(grey[..., None], 3, axis=2))
    truth = grey > 127
    np.testing.assert_array_equal(raw(truth.reshape(shape))[..., 0], truth * np.uint8(255))


def test_the_smallest_arrays_and_ambiguous_layouts(raw: Any) -> None:
    colour = np.array([[[10, 20, 30]]], np.uint8)
    np.testing.assert_array_equal(raw(colour), colour)  # one pixel: height, width, channels
    np.testing.assert_array_equal(raw(torch.from_numpy(colour).reshape(3, 1, 1)), colour)
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    np.testing.assert_array_equal(raw(cube), cube)
    np.testing.assert_array_equal(raw(torch.from_numpy(cube)), cube.transpose(1, 2, 0))
    np.testing.assert_array_equal(raw(cube, input_data_format="channels_first"), cube.transpose(1, 2, 0))
    np.testing.assert_array_equal(raw(torch.from_numpy(cube), input_data_format="channels_last"), cube)
    nested = {"images_kwargs": {"input_data_format": "channels_first"}}
    np.testing.assert_array_equal(raw(cube, **nested), cube.transpose(1, 2, 0))


def test_a_url_or_base64_image_goes_through_transformers(raw: Any, make_image: Any, tmp_path: Path) -> None:
    make_image(6, 6).save(tmp_path / "a.png")
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    np.testing.assert_array_equal(raw(f"data:image/png;base64,{data}"), np.asarray(make_image(6, 6)))


def test_the_callers_image_stays_as_it_is(processor: Any, make_image: Any) -> None:
    image = make_image(20, 10).convert("P")
    before = image.tobytes()
    processor(images=image)
    assert (image.mode, image.size, image.tobytes()) == ("P", (20, 10), before)


BAD_IMAGES = {
    "a missing file": ("nowhere.png", "'nowhere.png' is not a file, a URL or an image in base64"),
    "a missing path": (Path("nowhere.png"), "No such file or directory"),
    "a folder": (".", "is not a file"),
    "an empty mapping": ({"bytes": None, "path": None}, "without `bytes`, `path` or `url`"),
    "a data URL without data": ("data:image/png;base64", "no comma"),
    "a data URL of noise": ("data:image/png;base64,%%%", "not base64"),
    "a host that does not exist": ("http://no.such.host.invalid/a.png", "cannot be read: "),
    "empty image": (Image.new("RGB", (0, 5)), r"empty \(0 x 5\)"),
    "empty array": (np.zeros((0, 5, 3), np.uint8), "empty"),
    "NaN": (np.full((4, 4, 3), np.nan), "NaN"),
    "NaN in a image": (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "NaN"),
    "infinite": (torch.full((3, 4, 4), torch.inf), "infinite"),
    "two channels": (np.zeros((7, 5, 2), np.uint8), r"shape \(7, 5, 2\)"),
    "five channels": (torch.zeros(5, 7, 7), r"shape \(5, 7, 7\)"),
    "one dimension": (np.zeros(4, np.uint8), r"shape \(4,\)"),
    "negative floats": (np.linspace(-1, 1, 48).reshape(4, 4, 3), "reach from -1 to 1"),
    "too large": (np.full((4, 4, 3), 2**20), "beyond 0..1, 0..255 or 0..65535"),
    "text for values": (np.full((4, 4, 3), "a"), "of type <U1"),
    "a number": (7, "of type int"),
    "bytes": (b"\x89PNG", "cannot identify an image in its 4 bytes"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_refused_by_its_number(processor: Any, make_image: Any, case: str) -> None:
    image, message = BAD_IMAGES[case]
    with pytest.raises(ValueError, match=f"^Image 1 cannot be used: .*{message}"):
        processor(images=[make_image(), image], text="<image><image>")


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_a_broken_file_is_refused_by_its_number(
    processor: Any, make_image: Any, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "broken.png"
    make_image(50, 50).save(path)
    path.write_bytes(path.read_bytes()[:-900] if content is None else content)  # None: a file cut short
    with pytest.raises(ValueError, match="^Image 0 cannot be used: "):
        processor(images=path, text="<image>")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_that_are_rescaled_already_stay_so(processor: Any, make_image: Any, dtype: Any) -> None:
    image = make_image()
    expected = processor(images=image, return_tensors="np")["pixel_values"]
    floats = np.asarray(image).astype(dtype) / 255
    for kwargs in ({"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}, {}):
        np.testing.assert_array_equal(
            processor(images=[floats], return_tensors="np", **kwargs)["pixel_values"], expected
        )
        losses = processor.image_losses([floats], **kwargs)
        assert losses == processor.image_losses(image)
    with pytest.raises(ValueError, match="image 1 is floats in 0..1, but image 0 is not"):
        processor(images=[image, floats], do_rescale=False)


def test_images_as_files_bytes_and_mappings(raw: Any, make_image: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "an image.png"
    make_image(6, 6).save(path)
    data = path.read_bytes()
    encoded = base64.b64encode(data).decode()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sources = [str(path), path, path.as_uri(), "~/an image.png", Path("~/an image.png"), "an image.png"]
    sources += [data, bytearray(data), memoryview(data), io.BytesIO(data), encoded, encoded[:60] + "\n" + encoded[60:]]
    sources += [{"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, {"url": path.as_uri()}]
    sources += [f"data:{kind};base64,{encoded}" for kind in ("image/png", "", "IMAGE/x-odd;q=1", "text/plain")]
    sources += [f"data:,{urllib.parse.quote(data)}", f"DATA:image/png;BASE64,{encoded.rstrip('=')}"]
    for source in sources:
        np.testing.assert_array_equal(raw(source), np.asarray(make_image(6, 6)))


def test_generators_and_columns_are_lists(processor: Any, make_image: Any) -> None:
    images = [make_image(), make_image(seed=1)]
    texts = ["<image>a", "<image>b"]
    expected = processor(images=images, text=texts, return_tensors="np")
    column = datasets.Dataset.from_dict({"image": images, "text": texts}).cast_column("image", datasets.Image())
    objects = np.empty(2, object)
    objects[:] = images
    given = [
        (iter(images), iter(texts)),
        ((image for image in images), tuple(texts)),
        (column["image"], column["text"]),
        (objects, np.array(texts)),
        (([image] for image in images), texts),
        ([iter([image]) for image in images], texts),
    ]
    for some_images, text in given:
        found = processor(images=some_images, text=text, return_tensors="np")
        for name in ("input_ids", "pixel_values"):
            np.testing.assert_array_equal(found[name], expected[name])


def test_everything_that_a_call_takes_may_be_in_a_chat(processor: Any, make_image: Any, tmp_path: Path) -> None:
    image = make_image(28, 28)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    array = np.array(image)
    given = [array, torch.from_numpy(array.transpose(2, 0, 1).copy()), data, io.BytesIO(data), {"bytes": data}, image]
    expected = processor(images=image, return_tensors="np")["pixel_values"]
    for source in given:
        content = [{"type": "image", "image": source}, {"type": "text", "text": "a"}]
        found = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=load_chat_template("vicuna_v1"),
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "np"},
        )
        np.testing.assert_array_equal(found["pixel_values"], expected)


# URLs.


class Answers(http.server.BaseHTTPRequestHandler):
    """A server that says 404, or sends a byte now and then, or never stops."""

    def do_GET(self) -> None:
        if self.path == "/headers":
            return self.drip(b"HTTP/1.1 200 OK\r\nX: ")
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        if self.path == "/image":
            self.wfile.write(self.server.image)  # type: ignore[attr-defined]
        elif self.path == "/drip":
            self.drip(b"")
        elif self.path == "/endless":
            self.drip(bytes(2**16), 0)

    def drip(self, first: bytes, pause: float = 0.05) -> None:
        with contextlib.suppress(OSError):
            self.wfile.write(first)
            while not self.server.is_done:  # type: ignore[attr-defined]
                self.wfile.write(first if pause == 0 else b"a")
                time.sleep(pause)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(make_image: Any) -> Any:
    file = io.BytesIO()
    make_image(6, 6).save(file, "PNG")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        running.image, running.is_done = file.getvalue(), False  # type: ignore[attr-defined]
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.is_done = True  # type: ignore[attr-defined]
        running.shutdown()


def test_a_url_is_read(raw: Any, make_image: Any, server: str) -> None:
    np.testing.assert_array_equal(raw(f"{server}/image"), np.asarray(make_image(6, 6)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "missing answers 404 Not Found"),
        ("drip", "timed out: it takes longer than 0.5 seconds"),
        ("headers", "timed out: it takes longer than 0.5 seconds"),
        ("endless", "sends more than 1 MiB"),
    ],
)
def test_a_url_that_gives_no_image_is_given_up(
    processor: Any, server: str, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.setattr(image_utils_delta_llava, "URL_TOTAL_TIMEOUT", 0.5)
    monkeypatch.setattr(image_utils_delta_llava, "URL_MAX_BYTES", 2**20)
    with pytest.raises(ValueError, match=f"^Image 0 cannot be used: .*{message}"):
        processor(images=f"{server}/{path}", text="<image>")


def test_a_url_that_keeps_silent_is_given_up(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_utils_delta_llava, "URL_TIMEOUT", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,  # takes the connection and says nothing
        pytest.raises(ValueError, match="^Image 0 cannot be used: .*timed out"),
    ):
        processor(images=f"http://127.0.0.1:{silent.getsockname()[1]}/a.png", text="<image>")
