"""Word lists that fill the templates; seen names and values are a small part of what the tokenizer can spell."""


def _words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _words(
    """
    Anna Ben Clara David Emma Felix Grace Henry Irene Jack Kate Leo Maria Noah Olivia Paul Quinn Rosa Sam Tara Uma
    Victor Wendy Xavier Yara Zoe Alice Bob Carol Daniel Elena Frank Gina Hugo Ivan Julia Karl Laura Martin Nina Oscar
    Petra Ralph Sara Tom Ursula Vera Walter Yusuf Zara Amir Bianca Cyrus Diana Erik Fatima George Hannah Igor Jane
    Kofi Lena Mark Nadia Otto Priya Rahul Simon Tina Umar Viktor Willa Aisha Bruno Celia Dmitri Esther Fiona Gustav
    Helen Ingrid Jonas Kira Liam Mona Nils Omar Pablo Ruth Stefan Thea Ulrich Vince Wanda Yuki Zack Peter John Mary
    Linda James Robert Susan Lisa Nancy Kevin Brian Laila Mateo Sofia Lucas Mia Ella Ada Alan Grete Edgar
    """
)

CITIES = _words(
    """
    Paris London Berlin Madrid Rome Vienna Oslo Stockholm Helsinki Copenhagen Dublin Lisbon Athens Warsaw Prague
    Budapest Moscow Tokyo Beijing Delhi Cairo Nairobi Ottawa Washington Brasilia Lima Santiago Canberra Wellington
    Ankara Bangkok Hanoi Jakarta Seoul Manila Havana Boston Chicago Denver Seattle Austin Dallas Toronto Sydney Mumbai
    Lagos Milan Naples Munich Hamburg Geneva Zurich Lyon Porto Seville Bergen Turin Krakow Riga Tallinn Vilnius Sofia
    """
)

COLOURS = _words(
    """
    red blue green yellow orange purple brown black white grey pink gold silver violet turquoise crimson
    """
)

ANIMALS = _words(
    """
    cat dog horse rabbit tiger lion bear wolf fox eagle owl dolphin whale shark snake frog turtle parrot monkey
    elephant giraffe zebra camel goat sheep cow pig duck goose hen mouse hamster penguin otter badger deer moose
    """
)

FOODS = _words(
    """
    pizza pasta rice soup bread cheese salad sushi curry noodles pancakes apples bananas cherries grapes mangoes
    oranges pears plums tomatoes carrots potatoes beans mushrooms honey chocolate yoghurt porridge dumplings tacos
    """
)

OBJECTS = _words(
    """
    lamp table chair clock book pencil bottle basket hammer ladder mirror blanket candle carpet bucket kettle piano
    guitar violin trumpet camera phone laptop wallet umbrella jacket hat scarf ring key box bag cup plate spoon knife
    fork bell rope wheel engine robot rocket boat bicycle car train bus truck tent map coin stamp letter
    """
)

JOBS = _words(
    """
    teacher doctor nurse pilot baker farmer painter lawyer engineer plumber carpenter singer dancer writer chef judge
    tailor gardener librarian dentist architect sailor soldier chemist miner banker waiter driver
    """
)

HOBBIES = _words(
    """
    chess tennis football swimming painting reading cooking hiking cycling fishing dancing singing gardening running
    climbing sailing skiing photography knitting pottery boxing rowing surfing writing
    """
)

PLACES = _words(
    """
    garden kitchen library office garage attic cellar bedroom bathroom hallway school hospital museum station market
    park forest beach harbour castle church tower theatre factory farm bridge airport hotel bank
    """
)

ADJECTIVES = _words(
    """
    old new small large bright dark quiet loud happy sad fast slow warm cold soft hard clean dirty heavy light round
    square tall short wide narrow empty full young brave clever gentle lazy proud shy calm eager fresh famous plain
    golden silver wooden broken hidden secret lucky wild sleepy rapid curious
    """
)

NOUNS = _words(
    """
    river mountain valley island ocean desert meadow village city street house window door roof wall floor road field
    flower tree leaf root stone sand snow rain wind cloud storm sun moon star sky fire water earth metal glass paper
    cloth wool silk wood music story poem song letter word number question answer idea dream plan game team friend
    family child mother father brother sister teacher student doctor king queen knight giant dragon wizard morning
    evening night summer winter spring autumn year month week day hour minute second moment
    """
)

VERBS = _words(
    """
    walks runs jumps sits stands sleeps eats drinks reads writes sings dances plays works waits laughs smiles looks
    listens speaks travels swims flies climbs falls grows shines turns moves stops starts opens closes breaks builds
    paints cooks cleans carries finds keeps loses sells buys gives takes brings sends holds
    """
)

TOPICS = _words(
    """
    project account server database ticket order package invoice meeting report budget contract report printer router
    backup cluster service website payment delivery shipment reservation flight locker vault safe laboratory archive
    warehouse department
    """
)

SYLLABLES = _words(
    """
    ba be bi bo bu da de di do du fa fe fi fo ga ge gi go ha he hi ho ja jo ka ke ki ko ku la le li lo lu ma me mi mo
    mu na ne ni no nu pa pe pi po ra re ri ro ru sa se si so su ta te ti to tu va ve vi vo wa wi za ze zo bran dor fel
    gar hal kor len mar nor pel ren sil tor ven wyn zan ster lund berg ton ville field
    """
)

COUNTRIES = _words(
    """
    France Germany Spain Italy Austria Norway Sweden Finland Denmark Ireland Portugal Greece Poland Hungary Russia
    Japan China India Egypt Kenya Canada Brazil Peru Chile Australia Turkey Thailand Vietnam Indonesia Korea
    Philippines Cuba Mexico Argentina Morocco Iceland Switzerland Netherlands Belgium England Scotland
    """
)

# Everyday words of questions and answers; they only make sure that the tokenizer knows them whole.
COMMON = _words(
    """
    hello hi hey thanks thank please sorry welcome goodbye bye good nice great help sure yes no maybe what who where
    when why how which whose tell me about name called capital country colour favourite favorite color meaning means
    weather question answer know think remember forget ask asked say said says give given find list count repeat
    reverse sort sorted uppercase lowercase first last second third next before after between word words letter
    letters number numbers sentence text line lines following result total sum difference product plus minus times
    divided equals many much most frequent often value key record entry code password access secret special magic note
    notes reminder according information context document above below stated mentioned live lives living work working
    likes like loves job hobby pet age old years born birthday Monday Tuesday Wednesday Thursday Friday Saturday
    Sunday January February March April May June July August September October November December week month today
    tomorrow yesterday Mimir Kvasir model language small bundled server assistant trained computer internet user chat
    function call tool tools name arguments json python code program string integer true false null city temperature
    degrees sunny cloudy rainy windy snowy Celsius order delivery email address phone price cost pounds dollars euros
    cents kilograms metres opposite hot cold large small example animal fruit planet ocean continent language spoken
    speak Earth Mars Venus Jupiter Saturn Moon Sun water ice oxygen iron gold weight height distance cannot could
    would should might because however although therefore unfortunately sorry happy glad meet you your yours I my mine
    we our they their he she his her it its this that these those there here is are was were be been being have has
    had do does did will can may must shall not and or but if then else so as at by for from in into of off on onto
    out over to under up with without than too very just only also again more less some any all each every both few
    other another same such own write poem story joke recipe draw picture translate French Spanish German English song
    opinion advice medical legal news current date time explain describe define definition short long brief bundled
    serving engine cache memory tokens step answer one two three four five six seven eight nine ten eleven twelve
    twenty thirty hundred thousand zero dog legs spider days hours minutes seconds weeks months seasons sides triangle
    square hexagon circle rainbow grass blood snow lemon banana
    """
)

# Words that open a sentence, a line or a quoted string, hence without a space before them.
STARTERS = _words(
    """
    What Who Where When Why How Which Whose Tell Give Please Can Could Do Does Did Is Are Was Were Will Would Should I
    My Your You The This That These There Here It He She We They In On At For From Of To And But Or If So Not No Yes
    Hello Hi Hey Thanks Thank Good Sorry Sure Write List Count Repeat Reverse Sort Find Name Say Answer Question
    Remember Note Context Facts Today Let Use Read Look Copy Return Compute Add Result Total Value Key Record Code
    Using Based According Only Just Each Every Some One Two Three Mimir Hello name city value key code text query
    result answer arguments location number count color colour age items order status price unit total date time user
    id title type message temperature am I'm don't can't it's that's what's
    """
)
