"""Tiny random models of each backbone as transformers saves them, for tests/test_backbones*.py.

    case = CASES["smolvlm"]
    reference = case.make(folder)            # writes a whole folder, returns transformers' model
    inputs = case.inputs(pixels)             # what transformers calls our pixel values

Every parameter is drawn with a standard deviation of 0.2, biases and norms too, so that a part left
out or misplaced changes the logits. The tokenizer knows bytes and the backbone's special tokens.
"""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 300
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=0.01,
    max_position_embeddings=2048,
)
SHAPES = [(40, 40), (64, 20), (20, 64), (90, 61), (33, 70), (28, 28), (57, 56), (100, 30)]


def tokenizer(special_tokens: list[str]) -> Tokenizer:
    """Bytes 0 to 255, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in special_tokens]
    )
    return found


def draw_parameters(reference, image_token: int) -> None:
    """Random weights that all matter. The head never chooses the image token."""
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            is_norm = "norm" in name or "ln_q" in name
            parameter.normal_(std=0.2).add_(1.0 if is_norm and name.endswith("weight") else 0.0)
        reference.lm_head.weight[image_token] = 0


def write_json(path, content) -> None:
    path.write_text(json.dumps(content))


@dataclass
class Case:
    """One backbone: how transformers makes it, and what it is called with."""

    model_type: str
    special_tokens: list[str]
    image_token: str
    stop_token: str
    preprocessor: dict
    text_config: dict = field(default_factory=dict)
    vision_config: dict = field(default_factory=dict)
    top: dict = field(default_factory=dict)
    # What changes in `preprocessor` as the released files have it, and the sizes that belong to it.
    is_exported: bool = True
    released_preprocessor: dict = field(default_factory=dict)
    released_config: dict = field(default_factory=dict)

    def released(self) -> "Case":
        """The same with the released files' preprocessing."""
        return replace(self, preprocessor={**self.preprocessor, **self.released_preprocessor})

    @property
    def tokenizer(self) -> Tokenizer:
        return tokenizer(self.special_tokens)

    @property
    def image_id(self) -> int:
        return self.tokenizer.token_to_id(self.image_token)

    @property
    def stop_id(self) -> int:
        return self.tokenizer.token_to_id(self.stop_token)

    def config(self, text_config=(), vision_config=(), **top):
        import transformers

        text_config = {**TEXT, **self.text_config, **dict(text_config)}
        vision_config = {**self.vision_config, **dict(vision_config)}
        config_class = type(transformers.AutoConfig.for_model(self.model_type))
        return config_class(
            text_config=text_config,
            vision_config=vision_config,
            image_token_id=self.image_id,
            **{**self.top, **top},
        )

    def make(self, folder, **config):
        """Write a folder with all its files, and return the model in fp32."""
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        torch.manual_seed(0)
        config = self.config(**config)
        reference = transformers.AutoModelForImageTextToText.from_config(config).eval()
        draw_parameters(reference, self.image_id)
        reference.generation_config.eos_token_id = self.stop_id
        reference.save_pretrained(folder)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "preprocessor_config.json", self.preprocessor)
        names = {"eos_token": self.stop_token, "pad_token": self.special_tokens[0]}
        names["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(folder / "tokenizer_config.json", names)
        return reference

    def processor(self, folder):
        """transformers' PIL image processor of a folder."""
        raise NotImplementedError

    def inputs(self, pixels: list[torch.Tensor]) -> dict:
        raise NotImplementedError

    def token_types(self, input_ids: torch.Tensor) -> dict:
        """What transformers wants beside the token ids."""
        return {}

    def reference_name(self, name: str) -> str:
        """Our name of a parameter -> its name in a running transformers model."""
        raise NotImplementedError

    def expand(self, prompt: str, prepared: dict) -> str:
        """A prompt with one image as transformers' processor writes it, for a prepared image."""
        raise NotImplementedError


class SmolCase(Case):
    def processor(self, folder):
        from transformers.models.idefics3.image_processing_pil_idefics3 import (
            Idefics3ImageProcessorPil,
        )
        from transformers.models.smolvlm.image_processing_pil_smolvlm import (
            SmolVLMImageProcessorPil,
        )

        kinds = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}
        return kinds[self.model_type].from_pretrained(folder, do_image_splitting=False)

    def inputs(self, pixels):
        return {"pixel_values": torch.stack(list(pixels))[:, None]}  # one frame an image

    def reference_name(self, name):
        if name.startswith("lm_head."):
            return name
        name = name.replace("language_model.", "text_model.").replace(
            "vision_tower", "vision_model"
        )
        return "model." + name.replace("connector.", "connector.modality_projection.")

    def expand(self, prompt, prepared):
        frame = (
            "<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>"
        )
        return prompt.replace("<image>", frame)


SMOL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>"]
SMOL_TOKENS += ["<global-img>", "<image>", "<end_of_utterance>"]
SMOL = dict(
    special_tokens=SMOL_TOKENS,
    image_token="<image>",
    stop_token="<end_of_utterance>",
    preprocessor={
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.4, 0.6],
        "max_image_size": {"longest_edge": 32},
        "resample": 1,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 128},
    },
    text_config=dict(model_type="llama"),
    vision_config=dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        layer_norm_eps=0.02,
    ),
    top=dict(scale_factor=2, pad_token_id=0),
    released_preprocessor={
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": 512},
        "size": {"longest_edge": 2048},
    },
    released_config={"model_type": "smolvlm"},
)


class QwenCase(Case):
    def config(self, text_config=(), vision_config=(), **top):
        width = dict(text_config).get("hidden_size", TEXT["hidden_size"])
        return super().config(text_config, {"hidden_size": width, **dict(vision_config)}, **top)

    def processor(self, folder):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        return Qwen2VLImageProcessorPil.from_pretrained(folder)

    def inputs(self, pixels):
        """Cut as the paper's model wants them: rows of (3, 2, p, p), 2 x 2 patches side by side."""
        p = self.preprocessor["patch_size"]
        rows = []
        grids = []
        for image in pixels:
            image = image.numpy()
            height, width = image.shape[1] // p, image.shape[2] // p
            for block_row in range(0, height, 2):
                for block_column in range(0, width, 2):
                    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
                        top, left = (block_row + y) * p, (block_column + x) * p
                        patch = image[:, None, top : top + p, left : left + p]
                        rows.append(np.concatenate([patch, patch], axis=1).reshape(-1))
            grids.append([1, height, width])
        return {
            "pixel_values": torch.from_numpy(np.stack(rows)),
            "image_grid_thw": torch.tensor(grids),
        }

    def token_types(self, input_ids):
        return {"mm_token_type_ids": (input_ids == self.image_id).int()}

    def reference_name(self, name):
        if name.startswith("lm_head."):
            return name
        return "model." + name.replace("vision_tower", "visual")

    def expand(self, prompt, prepared):
        count = int(prepared["image_grid_thw"][0].prod()) // 4
        return prompt.replace("<|image_pad|>", "<|image_pad|>" * count)


class OneVisionCase(Case):
    def processor(self, folder):
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        oracle = LlavaOnevisionImageProcessorPil.from_pretrained(folder)

        def of_one(images, return_tensors):
            """As it prepares several images of one sample: one tile each."""
            prepared = oracle([[*images, *images]], return_tensors=return_tensors)
            return {"pixel_values": prepared["pixel_values"][: len(images)]}

        return of_one

    def inputs(self, pixels):
        pixels = torch.stack(list(pixels))
        sizes = [pixels.shape[-2:]] * len(pixels)
        return {
            "pixel_values": pixels[:, None],
            "image_sizes": torch.tensor(sizes),
            # Images of a sample; of one alone transformers would make several tiles.
            "batch_num_images": torch.tensor([max(len(pixels), 2)]),
        }

    def reference_name(self, name):
        return name if name.startswith("lm_head.") else "model." + name


ONEVISION = dict(
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
    image_token="<image>",
    stop_token="<|im_end|>",
    preprocessor={
        "do_pad": True,
        "image_grid_pinpoints": [[32, 32]],
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.4, 0.6],
        "resample": 3,
        "size": {"height": 32, "width": 32},
    },
    text_config=dict(model_type="qwen2"),
    vision_config=dict(
        model_type="siglip_vision_model",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        layer_norm_eps=0.02,
        vision_use_head=False,
    ),
    top=dict(image_grid_pinpoints=[[32, 32]]),
    is_exported=False,
    released_preprocessor={
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"height": 384, "width": 384},
    },
    released_config={"model_type": "llava_onevision"},
)
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"]
QWEN_TOKENS += ["<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
QWEN = dict(
    special_tokens=QWEN_TOKENS,
    image_token="<|image_pad|>",
    stop_token="<|im_end|>",
    preprocessor={
        "min_pixels": 300,
        "max_pixels": 4000,
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "image_processor_type": "Qwen2VLImageProcessor",
    },
    text_config=dict(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 1]}
    ),
    vision_config=dict(depth=2, embed_dim=32, num_heads=4, patch_size=8, mlp_ratio=2),
    top=dict(video_token_id=262, vision_start_token_id=259, vision_end_token_id=260),
    released_preprocessor={"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14},
    released_config={"model_type": "qwen2_vl"},
)
CASES = {
    "qwen2_vl": QwenCase(model_type="qwen2_vl", **QWEN),
    "llava_onevision": OneVisionCase(model_type="llava_onevision", **ONEVISION),
    "idefics3": SmolCase(model_type="idefics3", **SMOL),
    "smolvlm": SmolCase(model_type="smolvlm", **SMOL),
}


def pictures(count: int = len(SHAPES)) -> list[Image.Image]:
    """Noise of different shapes, always the same."""
    generator = np.random.default_rng(0)
    found = []
    for width, height in SHAPES[:count]:
        noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        found.append(Image.fromarray(noise))
    return found


def difficult_pictures(folder) -> dict:
    """Files of many shapes and modes, by name."""
    generator = np.random.default_rng(1)

    def noise(width, height, channels=3):
        shape = (height, width, channels) if channels > 1 else (height, width)
        return Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))

    made = {
        "wide": noise(600, 9),
        "tall": noise(5, 500),
        "one pixel": noise(1, 1),
        "tiny": noise(3, 2),
        "a line": noise(150, 1),
        "grey": noise(61, 47, 1),
        "alpha": noise(50, 70, 4),
        "grey and alpha": noise(50, 70, 4).convert("LA"),
        "palette": noise(70, 31).quantize(16),
        "black and white": noise(41, 41, 1).convert("1"),
        "square": noise(64, 64),
        "large": noise(1501, 997),
        "odd": noise(333, 517),
        "a photo's shape": noise(640, 480),
    }
    paths = {}
    for name, picture in made.items():
        paths[name] = folder / f"{name}.png"
        picture.save(paths[name])
    turned = Image.Exif()
    turned[0x0112] = 6  # on its side
    paths["EXIF"] = folder / "exif.jpg"
    noise(123, 45).save(paths["EXIF"], exif=turned, quality=95)
    return paths


def write_captions(folder, count: int = len(SHAPES)):
    """A training file: each picture with a short caption and a long one. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, picture in enumerate(pictures(count)):
        picture.save(folder / f"{number}.png")
        words = ["noise", "dots", f"number {number}", "of colours", "and no shapes"]
        record = {
            "image": f"{number}.png",
            "short": [f"picture {number}"],
            "long": [" ".join(words) + " at all." * (number % 3 + 1)],
        }
        lines.append(json.dumps(record))
    path = folder / "captions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
