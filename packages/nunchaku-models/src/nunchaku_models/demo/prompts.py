"""The objects on which the demo model is judged: names of the judge's classes, to be drawn in either style."""

_SHORT = """
red apple; pizza; rocket; snowman; sunflower; dog face; cat face; tropical fish; airplane; fire engine; house; crown;
soccer ball; blue heart; yellow heart; grinning face; crying face; robot; ghost; alien; banana; watermelon; hamburger;
ice cream; alarm clock; key; umbrella; guitar; trophy; mushroom; evergreen tree; crescent moon
"""

_LONG = """
green apple; strawberry; lemon; pineapple; grapes; cherries; carrot; broccoli; avocado; hot dog; taco; sushi;
doughnut; cookie; birthday cake; lollipop; hot beverage; beer mug; wine glass; bread; cheese wedge; egg; tiger face;
lion; panda; fox; frog; koala; penguin; owl; eagle; butterfly; honeybee; lady beetle; snail; turtle; octopus; crab;
dolphin; whale; shark; elephant; giraffe; unicorn; dragon; rose; tulip; cactus; palm tree; four leaf clover; maple
leaf; sun; star; rainbow; fire; snowflake; umbrella with rain drops; cloud; full moon; automobile; bus; taxi; police
car; bicycle; motorcycle; tractor; helicopter; sailboat; locomotive; castle; tent; lighthouse; bridge at night;
basketball; baseball; tennis; american football; bowling; game die; teddy bear; balloon; wrapped gift; violin;
trumpet; drum; microphone; camera; television; laptop; mobile phone; light bulb; candle; closed book; envelope;
pencil; scissors; hammer; axe; magnet; locked; magnifying glass tilted left; hourglass done; bomb; gem stone; glasses;
top hat; t shirt; jeans; running shoe; backpack; red heart; green heart; pile of poo; skull; clown face; jack o
lantern; smiling face with sunglasses; face with tears of joy; angry face; thumbs up; brain; tooth; eye
"""


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).split("; "))


SHORT_LIST = _names(_SHORT)
"""32 well-known objects: the list of the published figures."""
LONG_LIST = _names(_LONG)
"""Other well-known objects."""
