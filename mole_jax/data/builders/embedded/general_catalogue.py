"""Which drawings of the packages are shown, by class and by concept.

A concept is the unit of the split: all skin tones, genders, colours and
orientations of a thing, and its drawings in both packages. A line reads

    concept = emoji name, emoji name ; clip art glob, clip art glob

and a line without "=" is the emoji of that name. Emoji names are the official
ones of emoji-test.txt without skin tone and gender ("man cook" is "cook");
globs are relative to openclipart's folder `png`, reach into the folders below
and lack the suffix.
"""

# The answer to "What is shown?" and its plural in captions.
PLURALS = {
  "animal": "animals",
  "building": "buildings",
  "clothing": "clothing",
  "face": "faces",
  "flag": "flags",
  "food": "food",
  "hand": "hands",
  "person": "people",
  "plant": "plants",
  "symbol": "symbols",
  "tool": "tools",
  "vehicle": "vehicles",
}

CATALOGUE = {
  "animal": """
        monkey = monkey, monkey face ; animals/*monkey*, animals/*orangutan*
        dog = dog, dog face, poodle, wolf ; animals/*dog_0*, animals/dog_head*
        cat = cat, cat face, black cat ; animals/*kitten*, animals/*cartoon_cat*
        fox
        raccoon = raccoon ; animals/raccoon*
        lion
        tiger = tiger, tiger face, leopard ; animals/color_tiger*
        horse = horse, horse face, donkey
        unicorn
        zebra
        deer = deer, moose ; animals/deer*
        cow = cow, cow face, ox, water buffalo ; animals/bull_*
        pig = pig, pig face, boar ; animals/pig_*
        sheep = ram, ewe ; animals/dall_sheep*, animals/sheep*
        goat = goat ; animals/goat*
        camel = camel, two-hump camel
        llama
        giraffe
        elephant = elephant, mammoth
        rhinoceros = rhinoceros ; animals/rhinoceros_3d*
        hippopotamus
        mouse = mouse, mouse face, rat ; animals/topo*
        hamster
        rabbit = rabbit, rabbit face ; animals/bunny*
        squirrel = chipmunk ; animals/cartoon_squirrel*
        beaver
        hedgehog
        bat = bat ; animals/bat_orlando*
        bear = bear, polar bear ; animals/bear_*
        koala
        panda
        sloth
        otter
        skunk
        kangaroo
        badger
        turkey
        chicken = chicken, rooster ; animals/rooster*, animals/hen_*
        chick = hatching chick, baby chick, front-facing baby chick
        bird = bird, black bird, dove ; animals/gull*, animals/seagull_nicu*
        penguin = penguin ; animals/emperor_penguin*
        eagle
        duck = duck, goose
        swan
        owl = owl ; animals/owl_on*
        flamingo
        peacock
        parrot
        frog = frog ; animals/red-eye_frog*, animals/rana0*
        crocodile
        turtle = turtle ; animals/turtle*
        lizard = lizard ; animals/lizard*
        snake
        dragon = dragon, dragon face ; animals/dragon_head*
        sauropod
        T-Rex
        whale = whale, spouting whale ; animals/bluewhale*
        dolphin = dolphin ; animals/dolphin_*
        seal = seal ; animals/seal*
        fish = fish, tropical fish, blowfish ; animals/pescetto*
        shark
        octopus
        jellyfish
        snail
        butterfly = butterfly ; animals/butterfly*, animals/farfalla_but*
        ant
        bee = honeybee ; animals/bee*, animals/flying_wasp*
        beetle = beetle, cockroach
        ladybird = lady beetle ; animals/ladybug*
        cricket
        spider
        scorpion = scorpion ; animals/scorpion*
        mosquito = mosquito, fly
    """,
  "building": """
        stadium
        classical building = classical building, bank
        hut
        house = house, house with garden, houses, derelict house ; \
buildings/homes/home*, \
buildings/homes/pinkhome*
        office building = office building, Japanese post office, post office
        hospital
        hotel = hotel, love hotel
        convenience store
        school = school ; buildings/school_country*
        department store
        factory = factory ; buildings/factory*
        Japanese castle
        castle = castle ; buildings/ch_teau*
        wedding chapel = wedding, church ; buildings/church_building*
        Tokyo tower = Tokyo tower ; buildings/eiffel_tower*
        mosque
        hindu temple
        synagogue
        shinto shrine
        kaaba
        tent = tent, circus tent, camping
        lighthouse = ; *lighthouse*
        capitol = ; buildings/us_capitol*
        library = ; buildings/carnegie*
        fire station = ; buildings/firestation*
        grain elevator = ; buildings/grain_elevator*
        water tower = ; buildings/water_tower*
    """,
  "clothing": """
        glasses = glasses, sunglasses, goggles ; people/clothing/sunglasses*
        lab coat
        safety vest
        necktie = necktie ; people/clothing/tie_*
        shirt = t-shirt, running shirt ; people/clothing/t-shirt_01*
        jeans
        scarf
        gloves = gloves ; people/clothing/mitten*
        coat
        socks
        dress
        kimono = kimono, martial arts uniform
        sari
        swimsuit = one-piece swimsuit, bikini
        shorts = shorts, briefs ; people/clothing/wild_summer*
        blouse = woman’s clothes
        handbag = handbag, purse, clutch bag
        backpack
        sandal = thong sandal, woman’s sandal ; people/clothing/thongs*
        man’s shoe
        running shoe = running shoe ; people/clothing/tennis_shoe*
        boot = hiking boot, woman’s boot ; people/clothing/hiking*
        flat shoe = flat shoe, ballet shoes
        high-heeled shoe
        crown = crown ; people/clothing/hats/*crown*
        hat = woman’s hat, top hat ; people/clothing/hats/*hat_*, \
people/clothing/hats/blue_fedora*, people/clothing/hats/sombrero*
        graduation cap
        cap = billed cap ; people/clothing/hats/baseball_cap*
        helmet = military helmet, rescue worker’s helmet
        ring = ring ; people/clothing/jewelry/wedding*
        turban = ; people/clothing/turban*
        winter hat = ; people/clothing/winter_hat*
    """,
  "face": """
        grinning = grinning face, grinning face with big eyes, \
grinning face with smiling eyes, beaming face with smiling eyes
        squinting = grinning squinting face, squinting face with tongue
        joy = face with tears of joy, rolling on the floor laughing
        smiling = slightly smiling face, smiling face, relieved face ; \
people/smilies/smiley00*
        winking = winking face, winking face with tongue
        halo = smiling face with halo
        heart eyes = smiling face with heart-eyes, smiling face with hearts
        star-struck
        kissing = kissing face, face blowing a kiss, \
kissing face with closed eyes, kissing face with smiling eyes
        tongue = face with tongue, face savoring food
        zany = zany face
        money-mouth = money-mouth face
        hand = thinking face, face with hand over mouth, shushing face
        zipper-mouth = zipper-mouth face
        neutral = neutral face, expressionless face, face without mouth
        smirking = smirking face, unamused face
        rolling eyes = face with rolling eyes
        grimacing = grimacing face
        lying = lying face
        sleeping = sleeping face, sleepy face
        drooling = drooling face
        mask = face with medical mask
        thermometer = face with thermometer, face with head-bandage
        nauseated = nauseated face, face vomiting
        hot = hot face
        cold = cold face
        woozy = woozy face
        crossed-out eyes = face with crossed-out eyes, face with spiral eyes
        exploding head
        cowboy = cowboy hat face
        partying = partying face, disguised face
        sunglasses = smiling face with sunglasses
        nerd = nerd face, face with monocle
        frowning = frowning face, slightly frowning face, worried face
        open mouth = face with open mouth, hushed face, astonished face
        flushed = flushed face
        pleading = pleading face
        crying = crying face, loudly crying face
        screaming = face screaming in fear, anguished face
        tired = tired face, weary face
        yawning = yawning face
        steam = face with steam from nose
        angry = angry face, enraged face, face with symbols on mouth
        devil = smiling face with horns, angry face with horns
        skull
        clown = clown face
        ogre
        goblin
        alien
        robot
        moon face = new moon face, full moon face
        sun face = sun with face
    """,
  "flag": """
        vertical bands = flag: France, flag: Italy, flag: Ireland, \
flag: Belgium, flag: Romania, flag: Mali, flag: Nigeria, flag: Peru
        horizontal bands = flag: Germany, flag: Netherlands, flag: Russia, \
flag: Hungary, flag: Bulgaria, flag: Austria, flag: Estonia, flag: Poland, \
flag: Ukraine, flag: Indonesia, flag: Gabon, flag: Yemen, flag: Colombia
        nordic cross = flag: Sweden, flag: Norway, flag: Denmark, \
flag: Finland, flag: Iceland
        union = flag: United Kingdom
        blue ensign = flag: Australia, flag: New Zealand, flag: Fiji
        disc = flag: Japan, flag: Bangladesh, flag: Palau
        one star = flag: Vietnam, flag: Morocco, flag: Somalia
        crescent = flag: Turkey, flag: Tunisia, flag: Pakistan
        stripes with canton = flag: United States, flag: Liberia, \
flag: Malaysia, flag: Togo
        triangle and stripes = flag: Cuba, flag: Puerto Rico
        triangle = flag: Czechia, flag: Bahamas, flag: Sudan, flag: Jordan
        Brazil = flag: Brazil
        Canada = flag: Canada
        China = flag: China
        Greece = flag: Greece, flag: Uruguay
        Israel = flag: Israel
        white cross = flag: Switzerland
        South Africa = flag: South Africa
        saltire = flag: Jamaica, flag: Scotland
        red cross = flag: England, flag: Georgia
        Kenya = flag: Kenya
        Cyprus = flag: Cyprus, flag: Kosovo
        North Macedonia = flag: North Macedonia
        South Korea = flag: South Korea
        Nepal = flag: Nepal
        Sri Lanka = flag: Sri Lanka
        Saudi Arabia = flag: Saudi Arabia
        Seychelles = flag: Seychelles
        Kazakhstan = flag: Kazakhstan
        Kiribati = flag: Kiribati
        Bhutan = flag: Bhutan
        Wales = flag: Wales
        Barbados = flag: Barbados
        diagonal = flag: Tanzania, flag: Congo - Kinshasa, \
flag: Trinidad & Tobago
        Albania = flag: Albania
        Portugal = flag: Portugal
        serrated = flag: Qatar, flag: Bahrain
        Europe = flag: European Union
        Panama = flag: Panama
        quarters = flag: Dominican Republic
        Guyana = flag: Guyana
        rainbow = rainbow flag
        chequered = chequered flag
        plain = black flag, white flag, pirate flag
        triangular = triangular flag
    """,
  "food": """
        grapes = grapes ; food/fruit/grapes_simple*
        melon = melon, watermelon ; food/fruit/watermelon*
        orange = tangerine ; food/fruit/orange*
        lemon = lemon ; food/fruit/lemon*, food/fruit/lime*
        banana = banana ; food/fruit/banana*
        pineapple = pineapple ; food/fruit/pineapple*
        mango
        apple = red apple, green apple ; food/fruit/*apple_*
        pear = pear ; food/fruit/pear*
        peach = peach ; food/fruit/peach*
        cherries = cherries ; food/fruit/cherr*
        strawberry = strawberry ; food/fruit/strawberry*
        blueberries
        kiwi fruit
        tomato
        olive
        coconut
        avocado
        eggplant
        potato = potato
        carrot
        corn = ear of corn ; food/vegetables/corn_cob*
        pepper = hot pepper, bell pepper ; food/vegetables/*pepper*, \
food/vegetables/paprika*
        cucumber
        broccoli
        garlic
        onion = onion ; food/vegetables/onion_j*
        peanuts
        pumpkin = ; food/pumpkin*
        bread = bread, baguette bread ; food/breads_and_carbs/bread*
        croissant = croissant ; food/breads_and_carbs/croissant*
        pretzel = pretzel ; food/breads_and_carbs/pretzel*
        bagel
        pancakes = pancakes ; food/breads_and_carbs/pancake*
        waffle
        cheese = cheese wedge ; food/dairy/cheese*
        meat = meat on bone, cut of meat ; food/meats_and_eggs/steak*
        poultry leg
        bacon
        hamburger = hamburger ; food/*burger*
        french fries = french fries ; food/*fries*
        pizza = pizza ; food/*pizza*
        hot dog = hot dog ; food/*hot_dog*
        sandwich = sandwich ; food/*sandwich*
        taco
        burrito = burrito ; food/*burrito*
        egg = egg, cooking ; food/meats_and_eggs/fried_egg*
        popcorn
        butter
        rice ball
        rice = cooked rice, curry rice
        spaghetti
        sushi
        fried shrimp
        dango
        dumpling
        ice cream = soft ice cream, ice cream, shaved ice ; \
food/desserts/cone*, food/desserts/glace*
        doughnut
        cookie
        cake = birthday cake, shortcake, cupcake ; food/desserts/*cake*, \
food/desserts/muffin*
        pie = pie ; food/desserts/pie_*
        chocolate bar
        candy = candy, lollipop ; food/desserts/candy_*, food/*lollipop*
        custard
        honey pot
    """,
  "hand": """
        waving hand
        raised back of hand
        hand with fingers splayed
        raised hand
        vulcan salute
        sideways hand = rightwards hand, leftwards hand, \
rightwards pushing hand, leftwards pushing hand
        flat hand = palm down hand, palm up hand
        OK hand
        pinched fingers
        pinching hand
        victory hand
        crossed fingers
        love-you gesture
        sign of the horns
        call me hand
        pointing sideways = backhand index pointing left, \
backhand index pointing right
        pointing up = backhand index pointing up, index pointing up
        pointing down = backhand index pointing down
        index pointing at the viewer
        thumb = thumbs up, thumbs down
        raised fist
        oncoming fist
        sideways fist = left-facing fist, right-facing fist
        clapping hands
        heart hands
        open hands
        palms up together
        handshake
        folded hands
        writing hand
        nail polish
        finger heart = hand with index finger and thumb crossed
    """,
  "person": """
        baby
        child = child, boy, girl
        adult = person, man, woman, blond hair
        beard
        curly hair = red hair, curly hair
        white hair = white hair, bald
        older person = older person, old man, old woman
        frowning = frowning, pouting
        gesturing NO
        gesturing OK
        tipping hand
        raising hand
        bowing
        facepalming
        shrugging
        health worker
        student
        teacher
        judge
        farmer
        cook
        mechanic
        factory worker
        office worker
        scientist
        technologist
        singer
        artist
        pilot
        astronaut
        firefighter
        police officer = police officer ; people/police_man*
        detective
        guard
        ninja
        construction worker
        crown = with crown, prince, princess
        wearing turban
        headscarf = woman with headscarf, with headscarf
        skullcap = with skullcap
        in tuxedo
        with veil
        pregnant = pregnant woman
        Santa Claus = Santa Claus, Mrs. Claus, mx claus
        superhero
        supervillain
        mage
        fairy
        vampire
        mermaid = merperson, merman, mermaid
        elf
        genie
        zombie
        walking = walking, running
        standing
        kneeling
        wheelchair = in motorized wheelchair, in manual wheelchair
        dancing
        lotus position = in lotus position
        fencing
        golfing
        swimming = swimming, surfing
        bouncing ball
        lifting weights
        biking = biking, mountain biking
        cartwheeling
        juggling
    """,
  "plant": """
        bouquet
        cherry blossom = cherry blossom ; plants/flowers/sakura*
        white flower
        lotus
        rosette
        rose = rose
        wilted flower
        hibiscus
        sunflower = sunflower ; plants/flowers/sun_flower*
        blossom = blossom ; plants/flowers/flower_0*, plants/flowers/flower?_j*
        tulip = tulip ; plants/flowers/tulips*
        hyacinth
        daffodil = ; plants/flowers/daffodil*
        daisy = ; plants/flowers/daisy*
        magnolia = ; plants/flowers/magnolia_w*
        geranium = ; plants/flowers/geranium*
        seedling
        potted plant = potted plant ; plants/flowers/flowerandpot*
        evergreen tree = evergreen tree, Christmas tree ; \
plants/*christmas_tree*, plants/*evergreen*
        deciduous tree = deciduous tree ; plants/trees/tree_02*
        palm tree = palm tree ; plants/*palmtree*
        cactus = cactus ; plants/cactus*, plants/cacuts*
        sheaf of rice = sheaf of rice ; plants/reed*
        herb
        shamrock = shamrock, four leaf clover ; plants/shamrock*
        maple leaf = maple leaf ; plants/fall_coloured_leaf*
        fallen leaf
        leaf = leaf fluttering in wind ; plants/leaf_0*
        mushroom = mushroom ; plants/mushroom*, plants/toadstool*, \
plants/champignon*
        bamboo = tanabata tree, pine decoration ; plants/bamboo_01*
        fern = ; plants/fern*
        leafy green
        acorn = chestnut ; plants/acorn*
    """,
  "symbol": """
        heart = red heart, orange heart, yellow heart, green heart, \
blue heart, purple heart, black heart, white heart, brown heart
        arrow = up arrow, right arrow, down arrow, left arrow, \
up-right arrow, down-left arrow
        keycap = keycap: 1, keycap: 2, keycap: 3, keycap: 7
        zodiac = Aries, Taurus, Gemini, Cancer, Leo, Virgo, Libra
        play button = play button, reverse button, fast-forward button
        pause button = pause button, stop button, record button
        letters = A button (blood type), B button (blood type), \
O button (blood type), P button
        warning
        no entry
        prohibited = prohibited, no smoking, no bicycles, no pedestrians
        radioactive
        biohazard
        stop sign
        recycling symbol
        peace symbol
        yin yang
        cross = latin cross, orthodox cross
        star = star, glowing star
        six-pointed star = star of David, dotted six-pointed star
        wheel of dharma
        circle = red circle, orange circle, yellow circle, green circle, \
blue circle, purple circle, brown circle
        square = red square, orange square, yellow square, green square, \
blue square, purple square, brown square
        diamond = large orange diamond, large blue diamond
        triangle = red triangle pointed up, red triangle pointed down
        question mark = red question mark, white question mark
        exclamation mark = red exclamation mark, white exclamation mark
        check mark = check mark, check mark button
        cross mark = cross mark, multiply, cross mark button
        plus
        infinity
        dollar = heavy dollar sign
        copyright = copyright, registered
        suit = spade suit, club suit
        musical note = musical note, musical notes
        gender sign = female sign, male sign
        hollow circle = hollow red circle
        trident emblem
        fleur-de-lis
        atom symbol
        wheelchair symbol
    """,
  "tool": """
        hammer = hammer ; tools/hammer*, tools/construction_hammer*
        axe = axe ; tools/axe*
        pick = pick, hammer and pick
        saw = carpentry saw ; tools/saw*
        wrench = wrench, hammer and wrench ; tools/wrench*
        screwdriver = screwdriver ; tools/screwdriver*
        scissors = scissors ; tools/scissors*
        shovel = ; tools/simple_shovel*, tools/roundpoint*
        trowel = ; tools/trowel*
        rake = ; tools/leafrake*, tools/cultivator*
        shears = ; tools/hedgeshear*, tools/bypass*
        drill = ; tools/drill*
        paint brush = paintbrush ; tools/paint_brush_costea*
        paint roller = ; tools/paint_roller_g*
        mallet = ; tools/wooden_mallot*
        anvil = ; tools/blacksmith_anvil*
        knife = kitchen knife, dagger ; tools/knife*
        pencil = pencil ; tools/pencil*
        pen = pen, fountain pen
        broom = broom ; tools/broom*
        bucket = bucket ; tools/bucket*
        key = key, old key ; tools/key_*
        lock = locked, unlocked ; tools/*lock_-*, tools/padlock*
        gear = gear ; tools/cog_*, tools/engrenagem*
        nut and bolt
        clamp
        toolbox
        magnet
        ladder
        ruler = straight ruler, triangular ruler
        magnifying glass = magnifying glass tilted left ; tools/*magnif*
        flashlight
        plunger
        razor
        toothbrush
        spoon = spoon, fork and knife
    """,
  "vehicle": """
        locomotive = locomotive
        railway car = railway car, tram car, tram, metro, light rail, station
        bullet train = high-speed train, bullet train, monorail
        bus = bus, oncoming bus, trolleybus ; transportation/vehicles/bus1_j*, \
transportation/vehicles/bus_01*
        minibus
        ambulance
        fire engine = fire engine ; *fire_engine_mi*
        police car = police car, oncoming police car
        taxi = taxi, oncoming taxi
        car = automobile, oncoming automobile, sport utility vehicle ; \
transportation/vehicles/redcar*, transportation/vehicles/skoda*
        pickup truck
        truck = delivery truck, articulated lorry ; \
transportation/vehicles/small_truck*
        tractor = tractor ; transportation/vehicles/trattore*
        racing car = racing car ; transportation/*formula_one*
        motorcycle = motorcycle ; transportation/*motorcycle*
        motor scooter
        wheelchair = manual wheelchair, motorized wheelchair
        auto rickshaw
        bicycle = bicycle ; transportation/vehicles/bic*
        kick scooter
        skateboard
        roller skate
        sailboat = sailboat ; transportation/boating/sailboat_illustration_*, \
transportation/boating/boat_jarno*
        canoe
        motor boat = speedboat, motor boat
        ship = passenger ship, ship, ferry ; transportation/vehicles/trawler*
        airplane = airplane, small airplane ; \
transportation/vehicles/air*, transportation/vehicles/military_air*
        helicopter
        cable car = mountain cableway, aerial tramway, suspension railway
        satellite
        rocket = rocket ; transportation/vehicles/rocket*
        flying saucer
        parachute
        tank = ; transportation/vehicles/m1_*
        sled = sled ; transportation/vehicles/sledge*
    """,
}
