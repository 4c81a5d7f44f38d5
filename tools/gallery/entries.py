"""What the gallery shows."""

from __future__ import annotations

import dataclasses as dc
import inspect


@dc.dataclass(frozen=True)
class Entry:
    """A picture, how it is made, and what is to be said of it."""

    name: str
    section: str
    title: str
    code: str
    """A command, or lines of Python that know `sfumato` and `model`, the embedded one. It writes `file`."""
    words: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", inspect.cleandoc(self.code))

    @property
    def command(self) -> bool:
        """Whether it is a command, not Python."""
        return self.code.startswith("sfumato ")

    @property
    def file(self) -> str:
        """The picture that it writes."""
        return f"{self.name}.png"


INTRODUCTION = """\
# Gallery

Every picture here was drawn by the model that comes with sfumato, 15 million weights that were trained on two processor
cores, in a second or so each, by the command or the lines beside it. `python -m tools.gallery` draws them all anew. In
Python, `model` is `sfumato.load("emoji")`."""

SECTIONS = {"Text": "", "Control": "", "Editing": "", "Guidance": "", "Adapters": ""}

T, C, E, G, A = SECTIONS

# fmt: off
ENTRIES = (
    Entry("apple", T, "A prompt", 'sfumato generate "red apple, noto" -o apple.png'),
    Entry("seeds", T, "Eight seeds", 'sfumato generate "a rocket" -n 8 --grid -o seeds.png',
          "Seeds differ little: of a rocket the model knows three pictures, and draws them."),
    Entry("colours", T, "Seven colours", """
        names = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
        prompts = [f"a {name} {thing}, noto style" for thing in ("cat face", "rose") for name in names]
        sfumato.generate(model, prompts, seed=1).grid(columns=7).save("colours.png")
        """, "Of each thing it has seen three of these at most."),
    Entry("two", T, "Two things", """
        prompts = ["a red apple and a penguin, noto style", "a fox and a blue heart, fluent 3d style",
                   "a pig face on the left, a tulip on the right, twemoji style"]
        made = [picture for prompt in prompts for picture in sfumato.generate(model, prompt, count=2)]
        sfumato.Images(made).grid(columns=6).save("two.png")
        """, "The first is there, the second often a guess: half a picture is 8 x 8 latents, and the model is small."),
    Entry("styles", T, "One thing in three styles", """
        prompts = [f"a hamburger, {style} style" for style in ("noto", "twemoji", "fluent 3d")]
        sfumato.generate(model, prompts, seed=3).grid().save("styles.png")
        """),
    Entry("guidance", T, "Guidance scales 1.1, 3 and 7.5", """
        from sfumato import CFG

        made = []
        for scale in (1.1, 3, 7.5):
            made += sfumato.generate(model, "a penguin, noto style", count=4, controls=[CFG(scale)])
        sfumato.Images(made).grid(columns=4).save("guidance.png")
        """, "A row for each. 7.5 roughens it; left to itself, the model takes 3 in the first third of the steps."),
    Entry("negative", T, "A negative prompt", """
        from sfumato import CFG

        plain = sfumato.generate(model, "a heart", count=4)
        other = sfumato.generate(model, "a heart", negative="red heart", count=4, controls=[CFG(3)])
        sfumato.Images([*plain, *other]).grid(columns=4).save("negative.png")
        """, "Without red, other colours come."),
    Entry("samplers", T, "Six samplers, twelve steps", """
        names = ("ddim", "euler", "euler a", "dpm++ 2m karras", "unipc", "heun")
        made = [sfumato.generate(model, "a sunflower, fluent 3d", sampler=name, steps=12)[0] for name in names]
        sfumato.Images(made).grid(columns=6).save("samplers.png")
        """),
    Entry("weights", T, "A weighted word: 0, 0.5, 1, 1.5", """
        prompts = [f"a (blue:{weight}) rose, noto style" for weight in (0, 0.5, 1, 1.5)]
        sfumato.generate(model, prompts, seed=5).grid(columns=4).save("weights.png")
        """, "At 0 the word is still in the sentence, and the rose no longer red."),

    Entry("sketch", C, "A sketch on paper",
          'sfumato generate "a cat face, noto style" --control sketch=sketch-cat.jpg -o sketch.png'),
    Entry("sketches", C, "Four sketches, three prompts each", """
        import numpy as np
        from PIL import Image
        from sfumato import CFG, ControlNet

        net = sfumato.load_controlnet("emoji-lines")
        wishes = {
            "cat": ["a cat face, fluent 3d style", "a blue cat face, noto style", "a tiger face, twemoji style"],
            "apple": ["a red apple, noto style", "a green apple, twemoji style", "a purple tomato, fluent 3d style"],
            "fish": ["a tropical fish, noto style", "a pink tropical fish, fluent 3d style", "a shark, twemoji style"],
            "house": ["a house, noto style", "a yellow house, fluent 3d style", "a purple castle, twemoji style"],
        }
        made = []
        for name, prompts in wishes.items():
            photo = Image.open(f"sketch-{name}.jpg").resize((128, 128))
            sketch = sfumato.annotate("sketch", photo)
            drawn = sfumato.generate(model, prompts, controls=[CFG.of(model), ControlNet(net, sketch)])
            made += [sfumato.Picture(np.asarray(photo)), *drawn]
        sfumato.Images(made).grid(columns=4).save("sketches.png")
        """),
    Entry("scales", C, "Scales of the ControlNet: 0, 0.3, 0.6, 1", """
        from PIL import Image
        from sfumato import CFG, ControlNet

        net = sfumato.load_controlnet("emoji-lines")
        sketch = sfumato.annotate("sketch", Image.open("sketch-cat.jpg").resize((128, 128)))
        made, prompt = [], "a panda, twemoji style"
        for scale in (0.0, 0.3, 0.6, 1.0):
            made += sfumato.generate(model, prompt, controls=[CFG.of(model), ControlNet(net, sketch, scale)])
        sfumato.Images(made).grid(columns=4).save("scales.png")
        """),
    Entry("edges", C, "Edges of a picture, other words", """
        sfumato generate "a polar bear, fluent 3d style" --control canny=painted-cat.png -n 4 --grid -o edges.png
        """, "A polar bear is pale on a white ground, and so are its outlines."),
    Entry("scribble", C, "The same by broad lines, which need not be followed exactly", """
        sfumato generate "a polar bear, fluent 3d" --control scribble=painted-cat.png,scale=0.8 \\
            -n 4 --grid -o scribble.png
        """),
    Entry("both", C, "Image-to-image and a ControlNet together", """
        sfumato generate "a fox, noto" --image painted-cat.png --control canny=painted-cat.png,scale=0.7 \\
            -n 4 --grid -o both.png
        """),
    Entry("grayscale", C, "Colours for a grey picture", """
        from PIL import Image
        from sfumato import CFG, ControlNet

        net = sfumato.load_controlnet("emoji-grayscale")
        grey = Image.open("painted-cat.png").convert("L").convert("RGB")
        controls = [CFG.of(model), ControlNet(net, grey)]
        wishes = ["a cat face, noto style", "a blue cat face, noto style", "a panda, noto style", "a green fox, noto"]
        sfumato.generate(model, wishes, controls=controls).grid(columns=4).save("grayscale.png")
        """),
    Entry("regions", C, "Painting by regions", """
        import numpy as np
        from sfumato import CFG, ControlNet

        net = sfumato.load_controlnet("emoji-regions")
        regions = sfumato.annotate("regions", "painted-cat.png")
        prompts = ["a cat face, noto style", "a tiger face, twemoji style", "a bear, fluent 3d style"]
        made = sfumato.generate(model, prompts, controls=[CFG.of(model), ControlNet(net, regions)])
        sfumato.Images([sfumato.Picture(np.asarray(regions)), *made]).grid(columns=4).save("regions.png")
        """),
    Entry("two-nets", C, "Two ControlNets: colours of one picture, lines of another", """
        from PIL import Image
        from sfumato import CFG, ControlNet

        lines, regions = (sfumato.load_controlnet(f"emoji-{name}") for name in ("lines", "regions"))
        sketch = sfumato.annotate("sketch", Image.open("sketch-cat.jpg").resize((128, 128)))
        colours = sfumato.annotate("regions", "painted-cat.png")
        controls = [CFG.of(model), ControlNet(lines, sketch, 0.8), ControlNet(regions, colours, 0.4)]
        made = sfumato.generate(model, "a cat face, noto style", count=4, controls=controls)
        made.grid(columns=4).save("two-nets.png")
        """),
    Entry("control-and-mask", C, "Inpainting under a ControlNet", """
        import numpy as np
        from PIL import Image
        from sfumato import CFG, ControlNet, Inpaint

        net = sfumato.load_controlnet("emoji-lines")
        painted = Image.open("painted-cat.png").convert("RGB")
        mask = np.zeros((128, 128), np.uint8)
        mask[50:] = 255
        controls = [CFG.of(model), ControlNet(net, sfumato.annotate("canny", painted)), Inpaint(painted, mask)]
        made = sfumato.generate(model, ["a tiger face, noto", "a panda, noto", "a pig face, noto"], controls=controls)
        sfumato.Images([sfumato.Picture(np.asarray(painted)), *made]).grid(columns=4).save("control-and-mask.png")
        """, "Of the painted cat, left, the ears stay as they are; the face is drawn anew along its lines."),

    Entry("img2img", E, "Image-to-image, strengths 0.3 to 0.9", """
        made = []
        for strength in (0.3, 0.5, 0.7, 0.9):
            made += sfumato.generate(model, "a tiger face, noto style", image="painted-cat.png", strength=strength)
        sfumato.Images(made).grid(columns=4).save("img2img.png")
        """, "From a cat that we have painted. The words win early: at 0.3 the tiger is there already."),
    Entry("inpainting", E, "Inpainting: the right half", """
        import numpy as np
        from sfumato import CFG, Inpaint

        mask = np.zeros((128, 128), np.uint8)
        mask[:, 64:] = 255
        (apple,) = sfumato.generate(model, "red apple, noto")
        controls = [CFG(5), Inpaint(apple.pil, mask)]
        sfumato.generate(model, "green apple, noto", controls=controls, count=4).grid(columns=4).save("inpainting.png")
        """, "By a model of 4 channels: what is known is put back in every step."),
    Entry("inversion", E, "A picture that the model never saw: inverted, and drawn again", """
        import numpy as np
        from PIL import Image

        latents, captions = sfumato.invert(model, "painted-cat.png", "a cat face, noto style", steps=50)
        again = sfumato.generate(model, captions, latents=latents, sampler="ddim", steps=50, controls=[])
        painted = sfumato.Picture(np.asarray(Image.open("painted-cat.png")))
        sfumato.Images([painted, *again]).grid(columns=2).save("inversion.png")
        """, "Left our painted cat, which is of none of the sets, right what 50 steps there and 50 back leave of it."),
    Entry("pix2pix-zero", E, "Pix2Pix-Zero: cat to dog", """
        from sfumato import CFG, Pix2PixZero

        edit = Pix2PixZero(
            source=["a cat face, noto", "a cat face, noto style"], target=["a dog face, noto", "a dog face, noto style"]
        )
        before = sfumato.generate(model, "a cat face, noto style", count=4, steps=50)
        after = sfumato.generate(model, "a cat face, noto style", count=4, steps=50, controls=[CFG(5), edit])
        sfumato.Images([*before, *after]).grid(columns=4).save("pix2pix-zero.png")
        """),

    Entry("sega", G, "Semantic guidance: another colour", """
        from sfumato import CFG, SEGA, Edit

        guidance, edit = CFG.of(model), SEGA([Edit("blue", scale=8, warmup=3)])
        plain = sfumato.generate(model, "a red heart, noto style", count=4, controls=[guidance])
        blue = sfumato.generate(model, "a red heart, noto style", count=4, controls=[guidance, edit])
        sfumato.Images([*plain, *blue]).grid(columns=4).save("sega.png")
        """, "Blue is added, and of the red a little stays. Their outlines suffer."),
    Entry("sag", G, "Self-attention guidance: none, 0.75, 1.5", """
        from sfumato import CFG, SAG

        made = []
        for scale in (0.0, 0.75, 1.5):
            made += sfumato.generate(model, "a fox, noto style", count=4, controls=[CFG(3), SAG(scale)])
        sfumato.Images(made).grid(columns=4).save("sag.png")
        """, "Nothing to be gained on 16 x 16 latents: what self-attention guidance sharpens is sharp already."),
    Entry("pag", G, "Perturbed-attention guidance: none, 2, 4", """
        from sfumato import CFG, PAG

        made = []
        for scale in (0.0, 2.0, 4.0):
            made += sfumato.generate(model, "an owl, fluent 3d style", count=4, controls=[CFG(3), PAG(scale)])
        sfumato.Images(made).grid(columns=4).save("pag.png")
        """, "A style that was held out for owls. Hardly anything changes."),
    Entry("attend-and-excite", G, "Attend-and-Excite: two things in one prompt", """
        from sfumato import CFG, AttendAndExcite

        prompt = "a cat and a frog, noto style"
        plain = sfumato.generate(model, prompt, count=4)
        both = sfumato.generate(model, prompt, count=4, controls=[CFG(5), AttendAndExcite(["cat", "frog"])])
        sfumato.Images([*plain, *both]).grid(columns=4).save("attend-and-excite.png")
        """, "It fails: two things at once are more than this small model does well, with it and without."),

    Entry("lora", A, "A LoRA for a style that the model never saw: strengths 0, 0.5, 1", """
        lora = sfumato.load_lora("emoji-blob", model)
        made = []
        for strength in (0.0, 0.5, 1.0):
            changed = lora.apply(model, strength)
            prompts = [f"a {thing}, noto blob style" for thing in ("cat face", "penguin", "rocket", "sunflower")]
            made += sfumato.generate(changed, prompts, seed=1)
        sfumato.Images(made).grid(columns=4).save("lora.png")
        """),
    Entry("lora-and-sketch", A, "The LoRA under a sketch", """
        sfumato generate "a cat face, noto blob style" --lora emoji-blob --control sketch=sketch-cat.jpg \\
            -n 4 --grid -o lora-and-sketch.png
        """, "Of the style, the sketch leaves little."),
    Entry("word", A, "A word that was taught: <blue-heart>", """
        changed = sfumato.load_embedding("emoji-blue-heart").apply(model)
        prompts = [f"a <blue-heart>, {style} style" for style in ("noto", "twemoji", "fluent 3d")]
        sfumato.generate(changed, prompts).grid().save("word.png")
        """),
    Entry("subject", A, "A subject that was taught: our painted cat", """
        changed = sfumato.load_lora("emoji-painted-cat", model).apply(model)
        sfumato.generate(changed, "a sks cat face", count=4).grid(columns=4).save("subject.png")
        """, "The first is the cat that was painted; a rank of 2, in 0.4 MB, does not hold it with every seed."),
    Entry("subject-and-sketch", A, "The subject after a sketch", """
        sfumato generate "a sks cat face" --lora emoji-painted-cat --control sketch=sketch-cat.jpg \\
            -n 4 --grid -o subject-and-sketch.png
        """),
)
# fmt: on
