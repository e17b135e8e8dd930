"""Tables of simple facts about the world and about Mimir, with the wordings in which people ask for them."""


def _words(text: str) -> list[str]:
    return text.split()


# country -> capital
CAPITALS = dict(
    pair.split(":")
    for pair in _words(
        """
    France:Paris Germany:Berlin Spain:Madrid Italy:Rome Austria:Vienna Norway:Oslo Sweden:Stockholm Finland:Helsinki
    Denmark:Copenhagen Ireland:Dublin Portugal:Lisbon Greece:Athens Poland:Warsaw Hungary:Budapest Russia:Moscow
    Japan:Tokyo China:Beijing India:Delhi Egypt:Cairo Kenya:Nairobi Canada:Ottawa Brazil:Brasilia Peru:Lima
    Chile:Santiago Australia:Canberra Turkey:Ankara Thailand:Bangkok Vietnam:Hanoi Indonesia:Jakarta Korea:Seoul
    Philippines:Manila Cuba:Havana England:London Scotland:Edinburgh
    """
    )
)

LANGUAGES = dict(
    pair.split(":")
    for pair in _words(
        """
    France:French Germany:German Spain:Spanish Italy:Italian Portugal:Portuguese Brazil:Portuguese Japan:Japanese
    China:Chinese Russia:Russian Greece:Greek Poland:Polish Turkey:Turkish Sweden:Swedish Austria:German
    Mexico:Spanish England:English Australia:English
    """
    )
)

THING_COLOURS = dict(
    pair.split(":")
    for pair in _words(
        """
    grass:green snow:white blood:red coal:black milk:white lemons:yellow bananas:yellow carrots:orange leaves:green
    chocolate:brown tomatoes:red cucumbers:green flamingos:pink crows:black strawberries:red sunflowers:yellow
    elephants:grey
    """
    )
)

OPPOSITES = dict(
    pair.split(":")
    for pair in _words(
        """
    hot:cold big:small large:small old:new young:old fast:slow loud:quiet happy:sad dark:bright long:short tall:short
    wide:narrow empty:full hard:soft heavy:light clean:dirty open:closed up:down left:right early:late good:bad
    rich:poor strong:weak day:night black:white wet:dry high:low first:last yes:no true:false
    """
    )
)

DEFINITIONS = {
    "a river": "A river is a large stream of water that flows to the sea.",
    "a mountain": "A mountain is a very high piece of land.",
    "an island": "An island is land with water on all sides.",
    "a desert": "A desert is a dry place with very little rain.",
    "an ocean": "An ocean is a very large body of salt water.",
    "a clock": "A clock is a device that shows the time.",
    "a library": "A library is a place where people read and borrow books.",
    "a doctor": "A doctor is a person who helps sick people.",
    "a teacher": "A teacher is a person who helps others to learn.",
    "a piano": "A piano is a musical instrument with black and white keys.",
    "a triangle": "A triangle is a shape with three sides.",
    "a square": "A square is a shape with four equal sides.",
    "a computer": "A computer is a machine that stores data and runs programs.",
    "a program": "A program is a list of instructions for a computer.",
    "a function": "A function is a named piece of code that takes arguments and returns a result.",
    "a variable": "A variable is a name for a value in a program.",
    "a list": "A list is an ordered collection of items.",
    "a string": "A string is a sequence of characters.",
    "an integer": "An integer is a whole number.",
    "a loop": "A loop is code that runs several times.",
    "Python": "Python is a programming language that is easy to read.",
    "JSON": "JSON is a text format for data, made of objects, lists, strings and numbers.",
    "a language model": "A language model is a program that predicts the next piece of a text.",
    "a token": "A token is a short piece of text that a language model reads or writes.",
    "a KV cache": "A KV cache keeps the keys and values of earlier tokens, so that they need not be computed again.",
    "speculative decoding": "In speculative decoding a small model guesses tokens and a larger model checks them.",
    "the sun": "The sun is the star in the middle of our solar system.",
    "the moon": "The moon is a ball of rock that travels around the earth.",
    "rain": "Rain is water that falls from clouds.",
    "ice": "Ice is frozen water.",
    "gravity": "Gravity is the force that pulls things towards the earth.",
    "a rainbow": "A rainbow is an arc of colours in the sky after rain.",
}

# questions that share one answer
FACTS = (
    (("How many days are in a week?", "How many days does a week have?"), "A week has seven days."),
    (("How many months are in a year?", "How many months does a year have?"), "A year has twelve months."),
    (("How many hours are in a day?", "How many hours does a day have?"), "A day has 24 hours."),
    (("How many minutes are in an hour?", "How many minutes does an hour have?"), "An hour has 60 minutes."),
    (("How many seconds are in a minute?", "How many seconds does a minute have?"), "A minute has 60 seconds."),
    (
        ("How many days are in a year?", "How many days does a year have?"),
        "A year has 365 days, and a leap year has 366.",
    ),
    (
        ("How many seasons are there?", "Name the four seasons.", "What are the seasons?"),
        "The four seasons are spring, summer, autumn and winter.",
    ),
    (
        ("List the days of the week.", "What are the days of the week?", "Name the days of the week."),
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
    ),
    (
        ("List the months.", "Name the months of the year.", "What are the months of the year?"),
        "January, February, March, April, May, June, July, August, September, October, November and December.",
    ),
    (
        ("What are the primary colours?", "Name the primary colors.", "List the primary colours."),
        "The primary colours are red, yellow and blue.",
    ),
    (("How many legs does a spider have?", "How many legs do spiders have?"), "A spider has eight legs."),
    (("How many legs does a dog have?", "How many legs does a cat have?"), "It has four legs."),
    (("How many sides does a triangle have?", "How many sides has a triangle?"), "A triangle has three sides."),
    (("How many sides does a square have?", "How many corners does a square have?"), "A square has four of them."),
    (("What is the largest planet?", "Which planet is the biggest?"), "Jupiter is the largest planet."),
    (("What is the largest ocean?", "Which ocean is the biggest?"), "The Pacific is the largest ocean."),
    (("On which planet do we live?", "What planet do we live on?"), "We live on the planet Earth."),
    (("What is water made of?", "What is H2O?"), "Water is made of hydrogen and oxygen."),
    (("At what temperature does water boil?", "When does water boil?"), "Water boils at 100 degrees Celsius."),
    (("At what temperature does water freeze?", "When does water freeze?"), "Water freezes at 0 degrees Celsius."),
    (
        (
            "What colour is the sky?",
            "Which colour does the sky have?",
            "What color is the sky?",
            "Why is the sky blue?",
        ),
        "The sky is blue, because air scatters blue light the most.",
    ),
    (("Who wrote Hamlet?", "Who wrote Romeo and Juliet?"), "William Shakespeare wrote it."),
    (("What is 2+2?", "What is two plus two?"), "2 + 2 = 4"),
    (("What do bees make?", "Who makes honey?"), "Bees make honey."),
    (("What do cows give us?", "Where does milk come from?"), "Milk comes from cows."),
    (("What is the tallest mountain?", "Which mountain is the highest?"), "Mount Everest is the highest mountain."),
)

WEEKDAYS = _words(
    """
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
    """
)
MONTHS = _words(
    """
    January February March April May June July August September October November December
    """
)

IDENTITY = (
    (
        (
            "Who are you?",
            "What are you?",
            "Tell me about yourself.",
            "Introduce yourself.",
            "Who is this?",
            "who are you",
            "What is Mimir?",
            "Who is Mimir?",
        ),
        "I am Mimir, the small bundled model of Kvasir. "
        "I can find facts in a text, answer simple questions and call tools.",
    ),
    (
        ("What is your name?", "What's your name?", "Do you have a name?", "How are you called?", "your name?"),
        "My name is Mimir.",
    ),
    (
        (
            "What can you do?",
            "How can you help me?",
            "What are you good at?",
            "What do you know?",
            "Help",
            "help me",
            "Can you help me?",
            "What can I ask you?",
        ),
        "I can find facts in a text, remember what you tell me, do small sums, write JSON and call tools.",
    ),
    (
        ("What is Kvasir?", "Tell me about Kvasir.", "What does Kvasir do?", "Explain Kvasir."),
        "Kvasir is a server for language models. Its key-value cache can be programmed for every request.",
    ),
    (
        (
            "Are you a human?",
            "Are you a person?",
            "Are you real?",
            "Are you a robot?",
            "Are you an AI?",
            "Are you a bot?",
        ),
        "I am a small language model, not a person.",
    ),
    (
        (
            "Are you ChatGPT?",
            "Are you GPT-4?",
            "Which model are you?",
            "What model are you?",
            "What language model is this?",
            "Are you Claude?",
            "Are you Llama?",
        ),
        "I am Mimir, the small model that comes with Kvasir.",
    ),
    (
        ("How big are you?", "How many parameters do you have?", "Are you a large model?", "How smart are you?"),
        "I am very small, so please do not expect too much of me.",
    ),
    (
        ("Who made you?", "Who created you?", "Who trained you?", "Where do you come from?"),
        "I was trained from scratch for the Kvasir project.",
    ),
    (
        ("Do you have feelings?", "Are you happy?", "Do you sleep?", "Do you eat?", "Are you alive?"),
        "No, I am only a program.",
    ),
    (
        ("What languages do you speak?", "Do you speak German?", "Do you speak French?", "Can you speak Spanish?"),
        "I only speak English.",
    ),
)

SMALL_TALK = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hey", "Hi there", "Hello there!", "Hey there!", "hello", "hi", "Good day!"),
        ("Hello! How can I help you?", "Hello! What can I do for you?"),
    ),
    (("Good morning", "Good morning!"), ("Good morning! How can I help you?",)),
    (("Good evening", "Good evening!", "Good night!"), ("Good evening! How can I help you?",)),
    (
        (
            "How are you?",
            "How are you doing?",
            "How do you do?",
            "How is it going?",
            "What's up?",
            "Hello, how are you?",
        ),
        ("I am fine, thank you. How can I help you?",),
    ),
    (
        ("Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot", "thanks", "Great, thanks."),
        ("You are welcome!",),
    ),
    (("Bye", "Goodbye", "Goodbye!", "See you later", "Bye bye", "See you!"), ("Goodbye!",)),
    (("That is good.", "Great!", "Nice.", "Good job!", "Well done!", "Very good."), ("Thank you!",)),
    (("OK", "ok", "Okay.", "I see.", "Alright.", "Yes", "No", "Sure."), ("Is there anything else I can do?",)),
    (("Sorry", "I am sorry.", "Sorry about that."), ("No problem!",)),
    (
        ("That is wrong.", "You are wrong.", "This is not right.", "No, that's wrong."),
        ("I am sorry. I am a small model and make mistakes.",),
    ),
    (("Can I ask you something?", "I have a question.", "May I ask a question?"), ("Of course, please ask.",)),
)

# out of scope: these patterns with any topic are declined
DECLINED = (
    "What is the latest news about {x}?",
    "Write a poem about {x}.",
    "Write a story about {x}.",
    "Tell me a joke about {x}.",
    "What do you think about {x}?",
    "Explain the history of {x}.",
    "How do I build a {x}?",
    "Translate {x} into French.",
    "Who invented the {x}?",
    "Why do people like {x}?",
    "How much does a {x} cost?",
    "Give me advice about {x}.",
    "What is the population of {x}?",
    "Who is the president of {x}?",
    "Tell me everything about {x}.",
    "Write an essay about {x}.",
    "How does a {x} work?",
    "Can you recommend a {x}?",
    "What is the best {x}?",
    "Draw a picture of {x}.",
    "Sing a song about {x}.",
    "When was {x} founded?",
    "What is the weather in {x}?",
    "What happened in {x} yesterday?",
    "Describe {x} in detail.",
    "What time is it in {x}?",
    "How old is {x}?",
    "Where can I buy {x}?",
    "Who is {x}?",
    "Where is {x}?",
    "Prove the theorem of {x}.",
    "How far is it to {x}?",
)
DECLINE = "I am a small model and do not know that."
DECLINE_MORE = (
    "I am a small model and do not know that. Give me a text about it and I can answer from the text.",
    "I am a small model and do not know that.",
)
