"""Words, names and sentence frames of the demo's eight languages, written by hand for this project.

Nothing here is taken from a corpus. Slots of the frames:

    {P} person   {O} organisation   {T} sports team (an organisation, often just a city's name)
    {L} place    {C} country   {R} river   {X} any one of person, organisation, place, country
    {Y} year     {N} small number   {role} profession   {kind} kind of place   {body} kind of organisation

`{L.gen}`, `{L.loc}` (and `{C.gen}`, `{C.loc}`) ask for the genitive and the locative, which Azerbaijani,
Lithuanian and Estonian mark on the name itself; their places are written `nominative/genitive/locative`.
"""

LANGUAGES = ("en", "es", "hi", "af", "az", "lt", "et", "nl")

# Fragments in the manner of titles, tables and lists, which need no words of any language.
SHARED_FRAMES = (
    "{X}",
    "* {X}",
    "'' {X} ''",
    "{P} ( {Y} – {Y} )",
    "{P} , {role}",
    "{P} ( {role} )",
    "{P} ( {C} )",
    "{P} ( {T} )",
    "{P} , {P} , {P}",
    "{L} , {C}",
    "{L} ( {kind} )",
    "{L} , {L} , {L} , {C}",
    "{O} ( {body} )",
    "{O} ( {L} )",
    "{T} – {T} {N} : {N}",
)

# Line n of one language says what line n of every other language says.
FRAMES = {
    "en": (
        "# REDIRECT {X}",
        "{P} was born in {Y} in {L} .",
        "{P} died in {L} in {Y} .",
        "{P} is a {role} from {L} .",
        "{L} is a city in {C} .",
        "{R} is a river in {C} .",
        "{L} is a village in {C} .",
        "The capital of {C} is {L} .",
        "{O} was founded in {Y} .",
        "{O} has its headquarters in {L} .",
        "{T} won the cup in {Y} .",
        "{P} played for {T} until {Y} .",
        "{P} , president of {O}",
        "Members : {P} , {P} and {P} .",
        "Cities : {L} , {L} and {L}",
        "Battle of {L} ( {Y} )",
        "{T} lost the match against {T} .",
    ),
    "es": (
        "# REDIRECCIÓN {X}",
        "{P} nació en {L} en {Y} .",
        "{P} murió en {L} en {Y} .",
        "{P} es {role} de {L} .",
        "{L} es una ciudad de {C} .",
        "{R} es un río de {C} .",
        "{L} es un pueblo de {C} .",
        "La capital de {C} es {L} .",
        "{O} se fundó en {Y} .",
        "{O} tiene su sede en {L} .",
        "{T} ganó la copa en {Y} .",
        "{P} jugó en {T} hasta {Y} .",
        "{P} , presidente de {O}",
        "Miembros : {P} , {P} y {P} .",
        "Ciudades : {L} , {L} y {L}",
        "Batalla de {L} ( {Y} )",
        "{T} perdió el partido contra {T} .",
    ),
    "hi": (
        "# पुनर्प्रेषित {X}",
        "{P} का जन्म {Y} में {L} में हुआ ।",
        "{P} की मृत्यु {Y} में {L} में हुई ।",
        "{P} {L} के {role} हैं ।",
        "{L} {C} का एक शहर है ।",
        "{R} {C} की एक नदी है ।",
        "{L} {C} का एक गाँव है ।",
        "{C} की राजधानी {L} है ।",
        "{O} की स्थापना {Y} में हुई ।",
        "{O} का मुख्यालय {L} में है ।",
        "{T} ने {Y} में कप जीता ।",
        "{P} ने {Y} तक {T} के लिए खेला ।",
        "{O} के अध्यक्ष {P}",
        "सदस्य : {P} , {P} और {P} ।",
        "शहर : {L} , {L} और {L}",
        "{L} का युद्ध ( {Y} )",
        "{T} ने {T} को मैच में हराया ।",
    ),
    "af": (
        "# AANSTUUR {X}",
        "{P} is in {Y} in {L} gebore .",
        "{P} is in {Y} in {L} oorlede .",
        "{P} is 'n {role} van {L} .",
        "{L} is 'n stad in {C} .",
        "{R} is 'n rivier in {C} .",
        "{L} is 'n dorp in {C} .",
        "Die hoofstad van {C} is {L} .",
        "{O} is in {Y} gestig .",
        "{O} se hoofkantoor is in {L} .",
        "{T} het die beker in {Y} gewen .",
        "{P} het tot {Y} vir {T} gespeel .",
        "{P} , president van {O}",
        "Lede : {P} , {P} en {P} .",
        "Stede : {L} , {L} en {L}",
        "Slag van {L} ( {Y} )",
        "{T} het die wedstryd teen {T} verloor .",
    ),
    "az": (
        "# İSTİQAMƏTLƏNDİRMƏ {X}",
        "{P} {L.loc} anadan olub ( {Y} ) .",
        "{P} {L.loc} vəfat edib ( {Y} ) .",
        "{P} tanınmış {role} olub .",
        "{L} {C.loc} yerləşən şəhərdir .",
        "{R} {C.loc} axan çaydır .",
        "{L} {C.loc} yerləşən kənddir .",
        "{C.gen} paytaxtı {L} şəhəridir .",
        "{O} təsis edilib ( {Y} ) .",
        "{O} {L.loc} yerləşir .",
        "{T} kuboku qazandı ( {Y} ) .",
        "{P} {T} klubunda oynayıb ( {Y} ) .",
        "{O} , prezident {P}",
        "Üzvlər : {P} , {P} və {P} .",
        "Şəhərlər : {L} , {L} və {L}",
        "{L} döyüşü ( {Y} )",
        "{T} matçda {T} klubuna uduzdu .",
    ),
    "lt": (
        "# PERADRESAVIMAS {X}",
        "{P} gimė {Y} m. {L.loc} .",
        "{P} mirė {Y} m. {L.loc} .",
        "{P} yra žinomas {role} .",
        "{L} – miestas {C.loc} .",
        "{R} – upė {C.loc} .",
        "{L} – kaimas {C.loc} .",
        "{C.gen} sostinė yra {L} .",
        "{O} veikia nuo {Y} m.",
        "{O} veikia {L.loc} .",
        "{T} laimėjo taurę {Y} m.",
        "{P} iki {Y} m. žaidė klube „ {T} “ .",
        "{O} , prezidentas {P}",
        "Nariai : {P} , {P} ir {P} .",
        "Miestai : {L} , {L} ir {L}",
        "{L.gen} mūšis ( {Y} )",
        "{T} pralaimėjo rungtynes klubui „ {T} “ .",
    ),
    "et": (
        "# SUUNA {X}",
        "{P} sündis {Y} . aastal {L.loc} .",
        "{P} suri {Y} . aastal {L.loc} .",
        "{P} on tuntud {role} .",
        "{L} on linn {C.loc} .",
        "{R} on jõgi {C.loc} .",
        "{L} on küla {C.loc} .",
        "{C.gen} pealinn on {L} .",
        "{O} asutati {Y} . aastal .",
        "{O} asub {L.loc} .",
        "{T} võitis karika {Y} . aastal .",
        "{P} mängis kuni {Y} . aastani klubis {T} .",
        "{O} , president {P}",
        "Liikmed : {P} , {P} ja {P} .",
        "Linnad : {L} , {L} ja {L}",
        "{L.gen} lahing ( {Y} )",
        "{T} kaotas mängu klubile {T} .",
    ),
    "nl": (
        "# DOORVERWIJZING {X}",
        "{P} werd in {Y} geboren in {L} .",
        "{P} overleed in {Y} in {L} .",
        "{P} is een {role} uit {L} .",
        "{L} is een stad in {C} .",
        "{R} is een rivier in {C} .",
        "{L} is een dorp in {C} .",
        "De hoofdstad van {C} is {L} .",
        "{O} werd opgericht in {Y} .",
        "Het hoofdkantoor van {O} staat in {L} .",
        "{T} won de beker in {Y} .",
        "{P} speelde tot {Y} voor {T} .",
        "{P} , voorzitter van {O}",
        "Leden : {P} , {P} en {P} .",
        "Steden : {L} , {L} en {L}",
        "Slag bij {L} ( {Y} )",
        "{T} verloor de wedstrijd tegen {T} .",
    ),
}

# Frames that the training splits never use, only validation and test.
HELD_OUT_FRAMES = {
    "en": (
        "{P} lives in {L} .",
        "{P} gave a concert in {L} in {Y} .",
        "{O} has an office in {L} .",
        "Museum in {L}",
        "Photograph : {P} , {L} , {Y}",
        "{P} joined {T} in {Y} .",
    ),
    "es": (
        "{P} vive en {L} .",
        "{P} dio un concierto en {L} en {Y} .",
        "{O} tiene una oficina en {L} .",
        "Museo en {L}",
        "Fotografía : {P} , {L} , {Y}",
        "{P} fichó por {T} en {Y} .",
    ),
    "hi": (
        "{P} का घर {L} में है ।",
        "{P} ने {Y} में {L} में संगीत कार्यक्रम किया ।",
        "{O} का एक कार्यालय {L} में है ।",
        "{L} में संग्रहालय",
        "चित्र : {P} , {L} , {Y}",
        "{P} {Y} में {T} में शामिल हुए ।",
    ),
    "af": (
        "{P} woon in {L} .",
        "{P} het in {Y} 'n konsert in {L} gegee .",
        "{O} het 'n kantoor in {L} .",
        "Museum in {L}",
        "Foto : {P} , {L} , {Y}",
        "{P} het in {Y} by {T} aangesluit .",
    ),
    "az": (
        "{P} {L.loc} yaşayır .",
        "{P} {L.loc} konsert verdi ( {Y} ) .",
        "{O} {L.loc} ofis açıb .",
        "{L.loc} muzey",
        "Şəkil : {P} , {L} , {Y}",
        "{P} {T} klubuna keçdi ( {Y} ) .",
    ),
    "lt": (
        "{P} gyvena {L.loc} .",
        "{P} {Y} m. surengė koncertą {L.loc} .",
        "{O} turi biurą {L.loc} .",
        "Muziejus {L.loc}",
        "Nuotrauka : {P} , {L} , {Y}",
        "{P} {Y} m. perėjo į klubą „ {T} “ .",
    ),
    "et": (
        "{P} elab {L.loc} .",
        "{P} andis {L.loc} kontserdi {Y} . aastal .",
        "{O} avas {L.loc} kontori .",
        "Muuseum {L.loc}",
        "Foto : {P} , {L} , {Y}",
        "{P} läks {Y} . aastal klubisse {T} .",
    ),
    "nl": (
        "{P} woont in {L} .",
        "{P} gaf in {Y} een concert in {L} .",
        "{O} heeft een kantoor in {L} .",
        "Museum in {L}",
        "Foto : {P} , {L} , {Y}",
        "{P} tekende in {Y} bij {T} .",
    ),
}

# Word-by-word dictionary for code-switching: one row a meaning, one column a language in the order of
# LANGUAGES. `/` separates alternatives, `-` says that the language's frames have no such single word.
LEXICON = tuple(tuple(cell.split("/") for cell in row.split()) for row in """
REDIRECT REDIRECCIÓN पुनर्प्रेषित AANSTUUR İSTİQAMƏTLƏNDİRMƏ PERADRESAVIMAS SUUNA DOORVERWIJZING
born nació जन्म gebore anadan gimė sündis geboren
died murió मृत्यु oorlede vəfat mirė suri overleed
in en में in - - - in
is es है/हैं is olub yra on is
from de के van - - - uit
of de का/की van - - - van
city ciudad शहर stad şəhərdir miestas linn stad
river río नदी rivier çaydır upė jõgi rivier
village pueblo गाँव dorp kənddir kaimas küla dorp
capital capital राजधानी hoofstad paytaxtı sostinė pealinn hoofdstad
founded fundó स्थापना gestig təsis/edilib - asutati opgericht
headquarters sede मुख्यालय hoofkantoor yerləşir veikia asub hoofdkantoor
won ganó जीता gewen qazandı laimėjo võitis won
cup copa कप beker kuboku taurę karika beker
played jugó खेला gespeel oynayıb žaidė mängis speelde
for en लिए vir klubunda klube klubis voor
until hasta तक tot - iki kuni tot
president presidente अध्यक्ष president prezident prezidentas president voorzitter
Members Miembros सदस्य Lede Üzvlər Nariai Liikmed Leden
Cities Ciudades शहर Stede Şəhərlər Miestai Linnad Steden
and y और en və ir ja en
Battle Batalla युद्ध Slag döyüşü mūšis lahing Slag
match partido मैच wedstryd matçda rungtynes mängu wedstrijd
lost perdió हराया verloor uduzdu pralaimėjo kaotas verloor
against contra को teen klubuna klubui klubile tegen
lives vive घर woon yaşayır gyvena elab woont
concert concierto कार्यक्रम konsert konsert koncertą kontserdi concert
gave dio किया gegee verdi surengė andis gaf
office oficina कार्यालय kantoor ofis biurą kontori kantoor
Museum Museo संग्रहालय Museum Muzeyi/muzey muziejus/Muziejus Muuseum Museum
University Universidad विश्वविद्यालय Universiteit Universiteti universitetas Ülikool Universiteit
Institute Instituto संस्थान Instituut İnstitutu institutas Instituut Instituut
Council Ayuntamiento निगम Stadsraad Bələdiyyəsi savivaldybė Linnavalitsus Gemeente
City Ciudad नगर - - - - -
United Atlético यूनाइटेड Rovers Dinamo Žalgiris Kalev Sparta
FC Real एफसी FK FK FK FC FC
Bank Banco बैंक Volksbank Bankı Bankas Pank Volksbank
Party Partido दल/पार्टी Party Partiyası Partija - Partij
Radio Radio समाचार Radio Radiosu Radijas Raadio Radio
Press Editorial प्रकाशन Pers Mətbuat Leidykla Kirjastus Pers
Alliance/Union Alianza/Unión/Frente मोर्चा/सभा/मंच Unie Cəbhəsi Sąjunga/Frontas Liit Unie
National Nacional/Central राष्ट्रीय/भारतीय Nasionale Milli Nacionalinis - Nationale
Railway Ferrocarriles रेल - - - Raudtee Spoorwegen
Theatre Teatro केन्द्र - Teatrı Teatras Teater Opera
Motors - मोटर्स Motors Motors - - Motors
Steel Aceros इस्पात - - - - -
- - अकादमी Akademie Akademiyası Akademija Akadeemia -
New Nueva नई New Nyu Naujoji New New
South - दक्षिण - Cənubi - - -
Photograph Fotografía चित्र Foto Şəkil Nuotrauka Foto Foto
joined fichó शामिल aangesluit keçdi perėjo läks tekende
. . । . . . . .
""".strip().splitlines())

# The k-th role, kind or body of one language means the k-th of every other.
ROLES = {
    "en": "footballer; journalist; writer; politician; painter; singer; scientist; poet",
    "es": "futbolista; periodista; novelista; estadista; artista; cantante; científico; poeta",
    "hi": "फुटबॉल खिलाड़ी; पत्रकार; लेखक; राजनेता; चित्रकार; गायक; वैज्ञानिक; कवि",
    "af": "sokkerspeler; joernalis; skrywer; politikus; skilder; sanger; wetenskaplike; digter",
    "az": "futbolçu; jurnalist; yazıçı; siyasətçi; rəssam; müğənni; alim; şair",
    "lt": "futbolininkas; žurnalistas; rašytojas; politikas; dailininkas; dainininkas; mokslininkas; poetas",
    "et": "jalgpallur; ajakirjanik; kirjanik; poliitik; maalikunstnik; laulja; teadlane; luuletaja",
    "nl": "voetballer; journalist; schrijver; politicus; schilder; zanger; wetenschapper; dichter",
}
KINDS = {
    "en": "city; river; village; island; region; lake; province",
    "es": "ciudad; río; pueblo; isla; región; lago; provincia",
    "hi": "शहर; नदी; गाँव; द्वीप; क्षेत्र; झील; प्रांत",
    "af": "stad; rivier; dorp; eiland; streek; meer; provinsie",
    "az": "şəhər; çay; kənd; ada; bölgə; göl; əyalət",
    "lt": "miestas; upė; kaimas; sala; regionas; ežeras; provincija",
    "et": "linn; jõgi; küla; saar; piirkond; järv; provints",
    "nl": "stad; rivier; dorp; eiland; regio; meer; provincie",
}
BODIES = {
    "en": "company; newspaper; party; band; club; school; bank",
    "es": "empresa; periódico; partido; banda; club; escuela; banco",
    "hi": "कंपनी; समाचारपत्र; दल; बैंड; क्लब; विद्यालय; बैंक",
    "af": "maatskappy; koerant; party; orkes; klub; skool; bank",
    "az": "şirkət; qəzet; partiya; qrup; klub; məktəb; bank",
    "lt": "bendrovė; laikraštis; partija; grupė; klubas; mokykla; bankas",
    "et": "ettevõte; ajaleht; erakond; ansambel; klubi; kool; pank",
    "nl": "bedrijf; krant; partij; band; club; school; bank",
}

# Lithuanian has men's names only: its nouns of profession would otherwise have to agree in gender.
FIRST_NAMES = {
    "en": "James Emily Oliver Charlotte Henry Alice George Margaret Edward Susan Walter Rachel Thomas Helen "
          "Arthur Victoria Austin Lincoln Florence Grace Harold Dorothy Samuel Judith Carter Madison",
    "es": "Carlos Lucía Javier Carmen Miguel Elena Fernando Pilar Santiago Rosario Andrés Marta Ignacio "
          "Dolores Alejandro Beatriz Ramón Isabel Rodrigo Teresa Joaquín Inés Emilio Mercedes Sergio Nuria",
    "hi": "राहुल अनीता विजय सुनीता अमित प्रिया राजेश कविता सुरेश मीना अर्जुन लता मोहन गीता संजय रेखा "
          "दीपक नेहा अनिल पूजा कृष्ण सीता विक्रम उषा रवि शांति",
    "af": "Pieter Annelise Johannes Elsabe Gerhard Marietjie Jacobus Hester Hendrik Riana Danie Sarie "
          "Francois Magda Kobus Liezel Wynand Petronella Schalk Antjie Christiaan Karlien Deon Wilma",
    "az": "Elçin Aysel Rəşad Günel Tural Leyla Orxan Nigar Fərid Sevinc Vüqar Könül Kamran Aygün Eldar Lalə "
          "Anar Nərmin Samir Fidan Ramil Xəyalə Teymur Ülviyyə",
    "lt": "Jonas Petras Antanas Kazys Vytautas Algirdas Mindaugas Tomas Darius Saulius Gintaras Rimantas "
          "Arvydas Linas Mantas Justinas Povilas Juozas Stasys Vincas Rokas Andrius Edgaras Marius",
    "et": "Mart Kadri Jaan Liis Toomas Piret Andres Maarja Rein Tiina Urmas Helve Priit Anneli Kalev Merike "
          "Indrek Triin Margus Ülle Peeter Kersti Tõnu Reet",
    "nl": "Jan Anneke Willem Saskia Kees Marijke Joost Femke Maarten Lotte Bram Sanne Dirk Hanneke Ruud "
          "Ingrid Jeroen Mieke Sander Liesbeth Gijs Roos Thijs Wouter",
}
# Several of these are names of towns as well: only the sentence tells Washington from Washington.
LAST_NAMES = {
    "en": "Washington Hughes Bennett Houston Carter Whitfield Lancaster Morgan Preston Harding Kingsley "
          "Ashford Burton Jackson Marlow Pemberton Stafford Wakefield Turner Wellington Fletcher Hastings "
          "Dalton Lincoln Chester Hollis",
    "es": "García Valencia Toledo Herrera León Zamora Castillo Ortega Navarro Mendoza Córdoba Salinas "
          "Fuentes Aranda Cáceres Robles Quintana Soria Montero Vidal Burgos Cabrera Lorca Medina Paredes "
          "Rioja",
    "hi": "शर्मा वर्मा गुप्ता सिंह पटेल मिश्रा यादव चौहान तिवारी जोशी अग्रवाल मेहता नायर रेड्डी देसाई बनर्जी "
          "कुलकर्णी त्रिपाठी चौधरी सक्सेना पाण्डेय भट्ट खन्ना मल्होत्रा नागपुरी जयपुरी",
    "af": "Botha Coetzee Steyn Pretorius Kruger Joubert Vermeulen Nel Malan Wessels Brink Cronjé Snyman "
          "Labuschagne Viljoen Swart Naudé Theron Marais Greyling Bester Retief Stander Wolmarans",
    "az": "Əliyev Məmmədov Həsənova Quliyev Hüseynov Abbasova İsmayılov Rzayev Bağırov Kərimova Mustafayev "
          "Cəfərov Səfərova Gəncəli Şirvani Bakuvi Qasımov Nəbiyev Vəliyeva Mirzəyev Şəkili Orucov Babayev "
          "Əhmədli",
    "lt": "Kazlauskas Petrauskas Jankauskas Stankevičius Vasiliauskas Žukauskas Butkus Paulauskas Urbonas "
          "Navickas Ramanauskas Kavaliauskas Savickas Mažeika Vilnius Baranauskas Šimkus Rudys Gudaitis "
          "Balčiūnas Daukantas Klimas Vaitkus Kairys",
    "et": "Tamm Saar Sepp Mägi Kask Kukk Rebane Ilves Koppel Lepik Pärn Kuusk Oja Raudsepp Vaher Põder "
          "Lääne Teder Järve Valga Rapla Kallas Toome Laur",
    "nl": "Jansen Bakker Visser Smit Meijer Mulder Bos Vos Peters Hendriks Dekker Brouwer Dijkstra Kuipers "
          "Veenstra Postma Hoekstra Schouten Delft Utrecht Breda Groen Molenaar Kramer",
}
LAST_NAME_PREFIXES = {"nl": ("van", "de", "van der"), "af": ("van", "du", "van der"), "es": ("de",)}

PLACES = {
    "en": "Washington; Lincoln; Houston; Lancaster; Preston; Chester; Wellington; New York; Los Angeles; "
          "Oxford; Bristol; Boston; Chicago; Melbourne; Stafford; Salt Lake City; Portland; Wakefield; "
          "Hastings; London; Manchester; Dublin; Glasgow; Cape Town; Delhi; Florence; Burton; Cardiff; "
          "Milton Keynes; Newcastle",
    "es": "Madrid; Barcelona; Valencia; Toledo; León; Zamora; Córdoba; Sevilla; Santiago; San Sebastián; "
          "Buenos Aires; Lima; Bogotá; Mendoza; Santa Cruz; Burgos; Medina; Soria; Salamanca; Granada; "
          "Cáceres; La Paz; Quito; Montevideo; Nueva York; Londres; Lorca; Ciudad Real; Bilbao; Salinas",
    "hi": "दिल्ली; मुंबई; कोलकाता; चेन्नई; जयपुर; लखनऊ; कानपुर; नागपुर; पटना; भोपाल; नई दिल्ली; वाराणसी; "
          "आगरा; "
          "इंदौर; पुणे; हैदराबाद; लंदन; न्यूयॉर्क; वाशिंगटन; उज्जैन; मेरठ; राँची; सूरत; ग्वालियर; माउंट आबू; "
          "शिमला; अमृतसर; जोधपुर; नवी मुंबई; ग्रेटर नोएडा",
    "af": "Kaapstad; Pretoria; Bloemfontein; Stellenbosch; Paarl; Worcester; Kimberley; Upington; George; "
          "Durban; Oos-Londen; Port Elizabeth; Johannesburg; Oudtshoorn; Knysna; Vryburg; Londen; Parys; "
          "Kruger; Bethlehem; Ladysmith; Windhoek; Groot Brakrivier; Beaufort-Wes; Malmesbury; Swellendam",
    "az": "Bakı/Bakının/Bakıda; Gəncə/Gəncənin/Gəncədə; Şəki/Şəkinin/Şəkidə; Quba/Qubanın/Qubada; "
          "Lənkəran/Lənkəranın/Lənkəranda; Naxçıvan/Naxçıvanın/Naxçıvanda; Sumqayıt/Sumqayıtın/Sumqayıtda; "
          "Şamaxı/Şamaxının/Şamaxıda; Şuşa/Şuşanın/Şuşada; Zaqatala/Zaqatalanın/Zaqatalada; "
          "Mingəçevir/Mingəçevirin/Mingəçevirdə; London/Londonun/Londonda; Paris/Parisin/Parisdə; "
          "Moskva/Moskvanın/Moskvada; İstanbul/İstanbulun/İstanbulda; Ankara/Ankaranın/Ankarada; "
          "Tiflis/Tiflisin/Tiflisdə; Nyu York/Nyu Yorkun/Nyu Yorkda; Qəbələ/Qəbələnin/Qəbələdə; "
          "Astara/Astaranın/Astarada; Yevlax/Yevlaxın/Yevlaxda; Qazax/Qazaxın/Qazaxda; "
          "Hacı Zeynalabdin/Hacı Zeynalabdinin/Hacı Zeynalabdində; Təbriz/Təbrizin/Təbrizdə",
    "lt": "Vilnius/Vilniaus/Vilniuje; Kaunas/Kauno/Kaune; Klaipėda/Klaipėdos/Klaipėdoje; "
          "Šiauliai/Šiaulių/Šiauliuose; Panevėžys/Panevėžio/Panevėžyje; Alytus/Alytaus/Alytuje; "
          "Utena/Utenos/Utenoje; Palanga/Palangos/Palangoje; Telšiai/Telšių/Telšiuose; "
          "Trakai/Trakų/Trakuose; Biržai/Biržų/Biržuose; Londonas/Londono/Londone; "
          "Paryžius/Paryžiaus/Paryžiuje; "
          "Ryga/Rygos/Rygoje; Varšuva/Varšuvos/Varšuvoje; Berlynas/Berlyno/Berlyne; Maskva/Maskvos/Maskvoje; "
          "Niujorkas/Niujorko/Niujorke; Naujoji Akmenė/Naujosios Akmenės/Naujojoje Akmenėje; "
          "Druskininkai/Druskininkų/Druskininkuose; Mažeikiai/Mažeikių/Mažeikiuose; Jonava/Jonavos/Jonavoje; "
          "Zarasai/Zarasų/Zarasuose; Didžioji Riešė/Didžiosios Riešės/Didžiojoje Riešėje",
    "et": "Tallinn/Tallinna/Tallinnas; Tartu/Tartu/Tartus; Pärnu/Pärnu/Pärnus; Narva/Narva/Narvas; "
          "Viljandi/Viljandi/Viljandis; Rakvere/Rakvere/Rakveres; Valga/Valga/Valgas; Võru/Võru/Võrus; "
          "Haapsalu/Haapsalu/Haapsalus; Paide/Paide/Paides; Rapla/Rapla/Raplas; "
          "Väike-Maarja/Väike-Maarja/Väike-Maarjas; Kuressaare/Kuressaare/Kuressaares; "
          "London/Londoni/Londonis; Pariis/Pariisi/Pariisis; Riia/Riia/Riias; Helsingi/Helsingi/Helsingis; "
          "Moskva/Moskva/Moskvas; Berliin/Berliini/Berliinis; New York/New Yorgi/New Yorgis; "
          "Jõgeva/Jõgeva/Jõgeval; Põlva/Põlva/Põlvas; Keila/Keila/Keilas; Rio de Janeiro/Rio de "
          "Janeiro/Rio de Janeiros; Stockholm/Stockholmi/Stockholmis",
    "nl": "Amsterdam; Rotterdam; Utrecht; Den Haag; Breda; Delft; Groningen; Eindhoven; Maastricht; Leiden; "
          "Haarlem; Arnhem; Nijmegen; Zwolle; Antwerpen; Gent; Den Helder; Londen; Parijs; Keulen; Tilburg; "
          "Alkmaar; Bergen op Zoom; Deventer; Leeuwarden; Kampen; New York; Brugge",
}
RIVERS = {
    "en": "Severn; Thames; Hudson; Mersey; Ohio; Red River; Trent; Avon",
    "es": "Ebro; Tajo; Duero; Guadalquivir; Río Negro; Segura; Turia; Bravo",
    "hi": "गंगा; यमुना; गोदावरी; नर्मदा; कावेरी; ब्रह्मपुत्र; कृष्णा; सोन",
    "af": "Oranjerivier; Vaalrivier; Breërivier; Tugela; Limpopo; Olifantsrivier; Gamka; Kei",
    "az": "Kür; Araz; Samur; Qanıx; Tərtər; Böyük Zəyəm; Həkəri; Pirsaat",
    "lt": "Nemunas; Neris; Nevėžis; Minija; Šventoji; Dubysa; Merkys; Jūra",
    "et": "Emajõgi; Kasari; Piusa; Ahja; Pärnu jõgi; Pedja; Keila jõgi; Vigala",
    "nl": "Rijn; Maas; Schelde; IJssel; Waal; Oude Rijn; Dommel; Vecht",
}
COUNTRIES = {
    "en": "England; India; Spain; Canada; Estonia; South Africa; Germany; Mexico; France; New Zealand; Peru",
    "es": "España; México; Argentina; Chile; Francia; Costa Rica; Alemania; Perú; India; Colombia; Estonia",
    "hi": "भारत; स्पेन; फ़्रांस; जर्मनी; नेपाल; दक्षिण अफ़्रीका; कनाडा; श्री लंका; रूस; चीन; जापान",
    "af": "Suid-Afrika; Namibië; Duitsland; Nederland; Spanje; Indië; Frankryk; Nieu-Seeland; Kanada; "
          "Rusland",
    "az": "Azərbaycan/Azərbaycanın/Azərbaycanda; Türkiyə/Türkiyənin/Türkiyədə; İran/İranın/İranda; "
          "Gürcüstan/Gürcüstanın/Gürcüstanda; Rusiya/Rusiyanın/Rusiyada; Almaniya/Almaniyanın/Almaniyada; "
          "İspaniya/İspaniyanın/İspaniyada; Hindistan/Hindistanın/Hindistanda; Fransa/Fransanın/Fransada; "
          "Cənubi Koreya/Cənubi Koreyanın/Cənubi Koreyada",
    "lt": "Lietuva/Lietuvos/Lietuvoje; Latvija/Latvijos/Latvijoje; Lenkija/Lenkijos/Lenkijoje; "
          "Vokietija/Vokietijos/Vokietijoje; Ispanija/Ispanijos/Ispanijoje; Indija/Indijos/Indijoje; "
          "Prancūzija/Prancūzijos/Prancūzijoje; Estija/Estijos/Estijoje; Rusija/Rusijos/Rusijoje; "
          "Naujoji Zelandija/Naujosios Zelandijos/Naujojoje Zelandijoje",
    "et": "Eesti/Eesti/Eestis; Läti/Läti/Lätis; Leedu/Leedu/Leedus; Soome/Soome/Soomes; "
          "Saksamaa/Saksamaa/Saksamaal; Hispaania/Hispaania/Hispaanias; India/India/Indias; "
          "Prantsusmaa/Prantsusmaa/Prantsusmaal; Venemaa/Venemaa/Venemaal; Costa Rica/Costa Rica/Costa Ricas",
    "nl": "Nederland; België; Duitsland; Spanje; India; Frankrijk; Estland; Suriname; Nieuw-Zeeland; "
          "Costa Rica; Rusland",
}

# Whole names of organisations, then patterns which make one out of a place.
ORGANISATIONS = {
    "en": "Harbour Radio; Northern Press; Royal Theatre; Union Bank; Green Party; Silver Records; "
          "Western Railway; National Library; Morning Post; Summit Motors; Labour Alliance; Atlas Energy; "
          "Orion Records; Liberty Press; United Steel; Pacific Airlines",
    "es": "Radio Nacional; Banco Central; Partido Verde; Teatro Real; Editorial Aurora; Diario del Sur; "
          "Ferrocarriles del Norte; Biblioteca Popular; Unión Cívica; Discos Sol; Línea Azul; "
          "Compañía Minera; Orquesta Juvenil; Aceros Unidos; Frente Obrero; Alianza Liberal",
    "hi": "राष्ट्रीय बैंक; जन मोर्चा; भारतीय रेल; लोक दल; किसान सभा; साहित्य परिषद; हिन्द इस्पात; नवभारत "
          "प्रकाशन; "
          "विज्ञान अकादमी; समता पार्टी; आकाश मोटर्स; कला केन्द्र; सूर्य समाचार; प्रगति मंच",
    "af": "Volksbank; Nasionale Party; Radio Karoo; Goue Aar; Kaapse Pers; Boere Unie; Afrikaanse Akademie; "
          "Suid Motors; Rooi Kruis; Protea Uitgewers; Vrye Burger; Wes Myne",
    "az": "Xalq Bankı; Yeni Yol Partiyası; Milli Kitabxana; Dövlət Filarmoniyası; Xəzər Neft; Odlar Yurdu; "
          "Elmlər Akademiyası; Azad Mətbuat; Gənc Tamaşaçılar Teatrı; Araz Radiosu; Vətən Cəbhəsi; Ulduz "
          "Motors",
    "lt": "Tautos Bankas; Darbo Partija; Nacionalinis Teatras; Baltijos Radijas; Žalioji Sąjunga; "
          "Mokslų Akademija; Aušros Leidykla; Šiaurės Energija; Rytų Paštas; Liaudies Frontas; Gintaro "
          "Kelias; "
          "Jaunimo Orkestras",
    "et": "Rahva Pank; Rohelised; Eesti Raudtee; Vanemuise Teater; Põhja Raadio; Teaduste Akadeemia; "
          "Koidu Kirjastus; Balti Energia; Tööliste Liit; Meie Post; Noorte Orkester; Virumaa Leht",
    "nl": "Volksbank; Groene Partij; Noordzee Radio; Nationale Opera; De Morgenpost; Oranje Unie; "
          "Zilveren Kruis; Delta Energie; Koninklijke Bibliotheek; Zuider Spoorwegen; Vrije Pers; Atlas "
          "Motors",
}
ORGANISATION_PATTERNS = {
    "en": ("University of {L}", "{L} City Council", "{L} Museum", "{L} Institute"),
    "es": ("Universidad de {L}", "Ayuntamiento de {L}", "Museo de {L}", "Instituto {L}"),
    "hi": ("{L} विश्वविद्यालय", "{L} नगर निगम", "{L} संग्रहालय", "{L} संस्थान"),
    "af": ("Universiteit van {L}", "{L} Stadsraad", "{L} Museum", "{L} Instituut"),
    "az": ("{L} Dövlət Universiteti", "{L} Bələdiyyəsi", "{L} Muzeyi", "{L} İnstitutu"),
    "lt": ("{L.gen} universitetas", "{L.gen} savivaldybė", "{L.gen} muziejus", "{L.gen} institutas"),
    "et": ("{L.gen} Ülikool", "{L.gen} Linnavalitsus", "{L.gen} Muuseum", "{L.gen} Instituut"),
    "nl": ("Universiteit {L}", "Gemeente {L}", "Museum {L}", "Instituut {L}"),
}
TEAM_PATTERNS = {
    "en": ("{L}", "{L}", "{L} United", "{L} FC"),
    "es": ("{L}", "{L}", "Real {L}", "Atlético {L}"),
    "hi": ("{L}", "{L}", "{L} यूनाइटेड", "{L} एफसी"),
    "af": ("{L}", "{L}", "{L} Rovers", "{L} FK"),
    "az": ("{L}", "{L}", "{L} FK", "Dinamo {L}"),
    "lt": ("{L}", "{L}", "FK {L}", "{L} Žalgiris"),
    "et": ("{L}", "{L}", "FC {L}", "{L} Kalev"),
    "nl": ("{L}", "{L}", "FC {L}", "Sparta {L}"),
}
