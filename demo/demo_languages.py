"""Words, names and sentence frames of the demo's eight languages, written by hand for this project.

Nothing here is taken from a corpus. Slots of the frames:

    {P} person   {O} organisation   {T} sports team (an organisation, often just a city's name)
    {L} place    {C} country        {X} any one of person, organisation, place, country
    {Y} year     {N} small number   {role} profession   {kind} kind of place   {body} kind of organisation

No frame asks for a name in another case than the nominative. `James=जेम्स` is a name with its spelling in Hindi;
names without one do not occur in Hindi sentences.
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
        "{P} lives in {L} .",
        "{P} gave a concert in {L} in {Y} .",
        "{O} has an office in {L} .",
        "Museum in {L}",
        "Photograph : {P} , {L} , {Y}",
        "{P} joined {T} in {Y} .",
    ),
    "es": (
        "# REDIRECCIÓN {X}",
        "{P} nació en {L} en {Y} .",
        "{P} murió en {L} en {Y} .",
        "{P} es {role} de {L} .",
        "{L} es una ciudad de {C} .",
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
        "{P} vive en {L} .",
        "{P} dio un concierto en {L} en {Y} .",
        "{O} tiene una oficina en {L} .",
        "Museo en {L}",
        "Fotografía : {P} , {L} , {Y}",
        "{P} fichó por {T} en {Y} .",
    ),
    "hi": (
        "# पुनर्प्रेषित {X}",
        "{P} का जन्म {Y} में {L} में हुआ ।",
        "{P} की मृत्यु {Y} में {L} में हुई ।",
        "{P} {L} के {role} हैं ।",
        "{L} {C} का एक शहर है ।",
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
        "{T} {T} से मैच हार गया ।",
        "{P} का घर {L} में है ।",
        "{P} ने {Y} में {L} में संगीत कार्यक्रम किया ।",
        "{O} का एक कार्यालय {L} में है ।",
        "{L} में संग्रहालय",
        "चित्र : {P} , {L} , {Y}",
        "{P} {Y} में {T} में शामिल हुए ।",
    ),
    "af": (
        "# AANSTUUR {X}",
        "{P} is in {Y} in {L} gebore .",
        "{P} is in {Y} in {L} oorlede .",
        "{P} is 'n {role} van {L} .",
        "{L} is 'n stad in {C} .",
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
        "{P} woon in {L} .",
        "{P} het in {Y} 'n konsert in {L} gegee .",
        "{O} het 'n kantoor in {L} .",
        "Museum in {L}",
        "Foto : {P} , {L} , {Y}",
        "{P} het in {Y} by {T} aangesluit .",
    ),
    "az": (
        "# İSTİQAMƏTLƏNDİRMƏ {X}",
        "{P} {Y} ildə {L} şəhərində anadan olub .",
        "{P} {Y} ildə {L} şəhərində vəfat edib .",
        "{P} {L} şəhərindən olan {role} .",
        "{L} {C} ölkəsində şəhərdir .",
        "{L} {C} ölkəsində kənddir .",
        "{C} ölkəsinin paytaxtı {L} şəhəridir .",
        "{O} {Y} ildə təsis edilib .",
        "{O} {L} şəhərində yerləşir .",
        "{T} {Y} ildə kuboku qazandı .",
        "{P} {Y} ilə qədər {T} klubunda oynayıb .",
        "{O} , prezident {P}",
        "Üzvlər : {P} , {P} və {P} .",
        "Şəhərlər : {L} , {L} və {L}",
        "{L} döyüşü ( {Y} )",
        "{T} matçda {T} klubuna uduzdu .",
        "{P} {L} şəhərində yaşayır .",
        "{P} {Y} ildə {L} şəhərində konsert verdi .",
        "{O} {L} şəhərində ofis açıb .",
        "{L} şəhərində muzey",
        "Şəkil : {P} , {L} , {Y}",
        "{P} {Y} ildə {T} klubuna keçdi .",
    ),
    "lt": (
        "# PERADRESAVIMAS {X}",
        "{P} gimė {Y} m. {L} mieste .",
        "{P} mirė {Y} m. {L} mieste .",
        "{P} – {role} iš {L} miesto .",
        "{L} – miestas šalyje {C} .",
        "{L} – kaimas šalyje {C} .",
        "Šalies {C} sostinė yra {L} .",
        "{O} veikia nuo {Y} m.",
        "{O} būstinė yra {L} mieste .",
        "{T} laimėjo taurę {Y} m.",
        "{P} iki {Y} m. žaidė klube „ {T} “ .",
        "{O} , prezidentas {P}",
        "Nariai : {P} , {P} ir {P} .",
        "Miestai : {L} , {L} ir {L}",
        "Mūšis : {L} ( {Y} )",
        "{T} pralaimėjo rungtynes klubui „ {T} “ .",
        "{P} gyvena {L} mieste .",
        "{P} {Y} m. surengė koncertą {L} mieste .",
        "{O} turi biurą {L} mieste .",
        "Muziejus {L} mieste",
        "Nuotrauka : {P} , {L} , {Y}",
        "{P} {Y} m. perėjo į klubą „ {T} “ .",
    ),
    "et": (
        "# SUUNA {X}",
        "{P} sündis {Y} . aastal {L} linnas .",
        "{P} suri {Y} . aastal {L} linnas .",
        "{P} on {role} {L} linnast .",
        "{L} on linn riigis {C} .",
        "{L} on küla riigis {C} .",
        "Riigi {C} pealinn on {L} .",
        "{O} asutati {Y} . aastal .",
        "{O} asub {L} linnas .",
        "{T} võitis karika {Y} . aastal .",
        "{P} mängis kuni {Y} . aastani klubis {T} .",
        "{O} , president {P}",
        "Liikmed : {P} , {P} ja {P} .",
        "Linnad : {L} , {L} ja {L}",
        "Lahing : {L} ( {Y} )",
        "{T} kaotas mängu klubile {T} .",
        "{P} elab {L} linnas .",
        "{P} andis {Y} . aastal {L} linnas kontserdi .",
        "{O} avas {L} linnas kontori .",
        "Muuseum {L} linnas",
        "Foto : {P} , {L} , {Y}",
        "{P} läks {Y} . aastal klubisse {T} .",
    ),
    "nl": (
        "# DOORVERWIJZING {X}",
        "{P} werd in {Y} geboren in {L} .",
        "{P} overleed in {Y} in {L} .",
        "{P} is een {role} uit {L} .",
        "{L} is een stad in {C} .",
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
        "{P} woont in {L} .",
        "{P} gaf in {Y} een concert in {L} .",
        "{O} heeft een kantoor in {L} .",
        "Museum in {L}",
        "Foto : {P} , {L} , {Y}",
        "{P} tekende in {Y} bij {T} .",
    ),
}

# The k-th entry of one language means the k-th of every other.
ROLES = {
    "en": "footballer, journalist, writer, politician, painter, singer, scientist, poet",
    "es": "futbolista, periodista, novelista, estadista, artista, cantante, científico, poeta",
    "hi": "फुटबॉल खिलाड़ी, पत्रकार, लेखक, राजनेता, चित्रकार, गायक, वैज्ञानिक, कवि",
    "af": "sokkerspeler, joernalis, skrywer, politikus, skilder, sanger, wetenskaplike, digter",
    "az": "futbolçu, jurnalist, yazıçı, siyasətçi, rəssam, müğənni, alim, şair",
    "lt": "futbolininkas, žurnalistas, rašytojas, politikas, dailininkas, dainininkas, mokslininkas, poetas",
    "et": "jalgpallur, ajakirjanik, kirjanik, poliitik, maalikunstnik, laulja, teadlane, luuletaja",
    "nl": "voetballer, journalist, schrijver, politicus, schilder, zanger, wetenschapper, dichter",
}
KINDS = {
    "en": "city, river, village, island, region, lake, province",
    "es": "ciudad, río, pueblo, isla, región, lago, provincia",
    "hi": "शहर, नदी, गाँव, द्वीप, क्षेत्र, झील, प्रांत",
    "af": "stad, rivier, dorp, eiland, streek, meer, provinsie",
    "az": "şəhər, çay, kənd, ada, bölgə, göl, əyalət",
    "lt": "miestas, upė, kaimas, sala, regionas, ežeras, provincija",
    "et": "linn, jõgi, küla, saar, piirkond, järv, provints",
    "nl": "stad, rivier, dorp, eiland, regio, meer, provincie",
}
BODIES = {
    "en": "company, newspaper, party, band, club, school, bank",
    "es": "empresa, periódico, partido, banda, club, escuela, banco",
    "hi": "कंपनी, समाचारपत्र, दल, बैंड, क्लब, विद्यालय, बैंक",
    "af": "maatskappy, koerant, party, orkes, klub, skool, bank",
    "az": "şirkət, qəzet, partiya, qrup, klub, məktəb, bank",
    "lt": "bendrovė, laikraštis, partija, grupė, klubas, mokykla, bankas",
    "et": "ettevõte, ajaleht, erakond, ansambel, klubi, kool, pank",
    "nl": "bedrijf, krant, partij, band, club, school, bank",
}
# The first country is that of the first language, and so on.
COUNTRIES = {
    "en": "England, Spain, India, South Africa, Azerbaijan, Lithuania, Estonia, Netherlands, Germany, "
          "France, Russia, Mexico, Canada, New Zealand, Japan, Turkey",
    "es": "Inglaterra, España, India, Sudáfrica, Azerbaiyán, Lituania, Estonia, Países Bajos, Alemania, "
          "Francia, Rusia, México, Canadá, Nueva Zelanda, Japón, Turquía",
    "hi": "इंग्लैंड, स्पेन, भारत, दक्षिण अफ़्रीका, अज़रबैजान, लिथुआनिया, एस्टोनिया, नीदरलैंड, जर्मनी, "
          "फ़्रांस, रूस, मेक्सिको, कनाडा, न्यूज़ीलैंड, जापान, तुर्की",
    "af": "Engeland, Spanje, Indië, Suid-Afrika, Azerbeidjan, Litaue, Estland, Nederland, Duitsland, "
          "Frankryk, Rusland, Meksiko, Kanada, Nieu-Seeland, Japan, Turkye",
    "az": "İngiltərə, İspaniya, Hindistan, Cənubi Afrika, Azərbaycan, Litva, Estoniya, Niderland, Almaniya, "
          "Fransa, Rusiya, Meksika, Kanada, Yeni Zelandiya, Yaponiya, Türkiyə",
    "lt": "Anglija, Ispanija, Indija, Pietų Afrika, Azerbaidžanas, Lietuva, Estija, Nyderlandai, Vokietija, "
          "Prancūzija, Rusija, Meksika, Kanada, Naujoji Zelandija, Japonija, Turkija",
    "et": "Inglismaa, Hispaania, India, Lõuna-Aafrika, Aserbaidžaan, Leedu, Eesti, Holland, Saksamaa, "
          "Prantsusmaa, Venemaa, Mehhiko, Kanada, Uus-Meremaa, Jaapan, Türgi",
    "nl": "Engeland, Spanje, India, Zuid-Afrika, Azerbeidzjan, Litouwen, Estland, Nederland, Duitsland, "
          "Frankrijk, Rusland, Mexico, Canada, Nieuw-Zeeland, Japan, Turkije",
}

# What makes an organisation or a team out of a place.
ORGANISATION_PATTERNS = {
    "en": "University of {L}, {L} City Council, {L} Museum, {L} Institute",
    "es": "Universidad de {L}, Ayuntamiento de {L}, Museo de {L}, Instituto {L}",
    "hi": "{L} विश्वविद्यालय, {L} नगर निगम, {L} संग्रहालय, {L} संस्थान",
    "af": "Universiteit van {L}, {L} Stadsraad, {L} Museum, {L} Instituut",
    "az": "{L} Universiteti, {L} Bələdiyyəsi, {L} Muzeyi, {L} İnstitutu",
    "lt": "{L} universitetas, {L} savivaldybė, {L} muziejus, {L} institutas",
    "et": "{L} Ülikool, {L} Linnavalitsus, {L} Muuseum, {L} Instituut",
    "nl": "Universiteit {L}, Gemeente {L}, Museum {L}, Instituut {L}",
}
TEAM_PATTERNS = {language: "{L}, {L}, {L} United, FC {L}" for language in LANGUAGES}
TEAM_PATTERNS["hi"] = "{L}, {L}, {L} यूनाइटेड, एफसी {L}"

FIRST_NAMES = {
    "en": "James=जेम्स, Emily=एमिली, Oliver=ओलिवर, Charlotte=शार्लट, Henry=हेनरी, Alice=ऐलिस, George=जॉर्ज, Margaret=मार्गरेट, "
          "Edward=एडवर्ड, Susan=सूज़न, Walter=वॉल्टर, Rachel=रेचल, Thomas=थॉमस, Helen=हेलेन, Arthur=आर्थर, Victoria=विक्टोरिया, "
          "Austin=ऑस्टिन, Florence=फ़्लोरेंस, Harold=हैरोल्ड, Dorothy=डोरोथी",
    "es": "Carlos=कार्लोस, Lucía=लूसिया, Javier=हावियर, Carmen=कारमेन, Miguel=मिगेल, Elena=एलेना, Fernando=फ़र्नांडो, Pilar=पिलार, "
          "Santiago=सैंटियागो, Rosario=रोसारियो, Andrés=आंद्रेस, Marta=मार्ता, Ignacio=इग्नासियो, Dolores=डोलोरेस, "
          "Alejandro=अलेहांद्रो, Beatriz=बेआट्रिज़, Ramón=रामोन, Isabel=इसाबेल, Rodrigo=रोड्रिगो, Teresa=टेरेसा",
    "hi": "Rahul=राहुल, Anita=अनीता, Vijay=विजय, Sunita=सुनीता, Amit=अमित, Priya=प्रिया, Rajesh=राजेश, Kavita=कविता, "
          "Suresh=सुरेश, Meena=मीना, Arjun=अर्जुन, Lata=लता, Mohan=मोहन, Gita=गीता, Sanjay=संजय, Rekha=रेखा, Deepak=दीपक, "
          "Neha=नेहा, Anil=अनिल, Pooja=पूजा",
    "af": "Pieter, Annelise, Johannes, Elsabe, Gerhard, Marietjie, Jacobus, Hester, Hendrik, Riana, Danie, Sarie, "
          "Francois, Magda, Kobus, Liezel, Wynand, Petronella, Schalk, Antjie",
    "az": "Elçin, Aysel, Rəşad, Günel, Tural, Leyla, Orxan, Nigar, Fərid, Sevinc, Vüqar, Könül, Kamran, Aygün, Eldar, "
          "Lalə, Anar, Nərmin, Samir, Fidan",
    "lt": "Jonas, Petras, Antanas, Kazys, Vytautas, Algirdas, Mindaugas, Tomas, Darius, Saulius, Gintaras, Rimantas, "
          "Arvydas, Linas, Mantas, Justinas, Povilas, Juozas, Stasys, Vincas",
    "et": "Mart, Kadri, Jaan, Liis, Toomas, Piret, Andres, Maarja, Rein, Tiina, Urmas, Helve, Priit, Anneli, Kalev, "
          "Merike, Indrek, Triin, Margus, Ülle",
    "nl": "Jan, Anneke, Willem, Saskia, Kees, Marijke, Joost, Femke, Maarten, Lotte, Bram, Sanne, Dirk, Hanneke, Ruud, "
          "Ingrid, Jeroen, Mieke, Sander, Liesbeth",
}
# Some of these are names of towns as well: only the sentence tells Washington from Washington.
LAST_NAMES = {
    "en": "Washington=वाशिंगटन, Hughes=ह्यूज़, Bennett=बेनेट, Houston=ह्यूस्टन, Carter=कार्टर, Whitfield=व्हिटफ़ील्ड, "
          "Lancaster=लैंकेस्टर, Morgan=मॉर्गन, Preston=प्रेस्टन, Harding=हार्डिंग, Kingsley=किंग्सले, Ashford=ऐशफ़ोर्ड, "
          "Burton=बर्टन, Jackson=जैक्सन, Marlow=मार्लो, Stafford=स्टैफ़र्ड, Turner=टर्नर, Wellington=वेलिंगटन, Dalton=डाल्टन, "
          "Lincoln=लिंकन",
    "es": "García=गार्सिया, Valencia=वालेंसिया, Toledo=टोलेडो, Herrera=हेरेरा, León=लियोन, Zamora=ज़मोरा, Castillo=कास्तियो, "
          "Ortega=ओर्टेगा, Navarro=नवारो, Mendoza=मेंडोज़ा, Córdoba=कोर्डोबा, Salinas=सालिनास, Fuentes=फ़ुएंतेस, Aranda=अरांडा, "
          "Robles=रोब्लेस, Quintana=किंटाना, Soria=सोरिया, Montero=मोंटेरो, Vidal=विडाल, Cabrera=कैबरेरा",
    "hi": "Sharma=शर्मा, Verma=वर्मा, Gupta=गुप्ता, Singh=सिंह, Patel=पटेल, Mishra=मिश्रा, Yadav=यादव, Chauhan=चौहान, "
          "Tiwari=तिवारी, Joshi=जोशी, Agrawal=अग्रवाल, Mehta=मेहता, Nair=नायर, Reddy=रेड्डी, Desai=देसाई, Banerjee=बनर्जी, "
          "Kulkarni=कुलकर्णी, Tripathi=त्रिपाठी, Nagpuri=नागपुरी, Jaipuri=जयपुरी",
    "af": "Botha, Coetzee, Steyn, Pretorius, Kruger, Joubert, van der Merwe, Nel, Malan, du Toit, Brink, Cronjé, Snyman, "
          "Labuschagne, Viljoen, Swart, van Wyk, Theron, Marais, Greyling",
    "az": "Əliyev, Məmmədov, Həsənova, Quliyev, Hüseynov, Abbasova, İsmayılov, Rzayev, Bağırov, Kərimova, Mustafayev, "
          "Cəfərov, Səfərova, Gəncəli, Şirvani, Bakuvi, Qasımov, Nəbiyev, Vəliyeva, Mirzəyev",
    "lt": "Kazlauskas, Petrauskas, Jankauskas, Stankevičius, Vasiliauskas, Žukauskas, Butkus, Paulauskas, Urbonas, "
          "Navickas, Ramanauskas, Kavaliauskas, Savickas, Mažeika, Vilnius, Baranauskas, Šimkus, Rudys, Gudaitis, "
          "Balčiūnas",
    "et": "Tamm, Saar, Sepp, Mägi, Kask, Kukk, Rebane, Ilves, Koppel, Lepik, Pärn, Kuusk, Oja, Raudsepp, Vaher, Põder, "
          "Lääne, Teder, Valga, Rapla",
    "nl": "Jansen, Bakker, de Visser, Smit, Meijer, Mulder, van den Bos, Vos, Peters, Hendriks, Dekker, de Brouwer, "
          "Dijkstra, Kuipers, van Veen, Postma, Hoekstra, Schouten, Delft, Breda",
}
PLACES = {
    "en": "Washington=वाशिंगटन, Lincoln=लिंकन, Houston=ह्यूस्टन, Lancaster=लैंकेस्टर, Preston=प्रेस्टन, Chester=चेस्टर, "
          "Wellington=वेलिंगटन, New York=न्यू यॉर्क, Los Angeles=लॉस एंजेल्स, Oxford=ऑक्सफ़ोर्ड, Bristol=ब्रिस्टल, Boston=बोस्टन, "
          "Chicago=शिकागो, Melbourne=मेलबर्न, Portland=पोर्टलैंड, Cape Town=केप टाउन, London=लंदन, Manchester=मैनचेस्टर, "
          "Dublin=डबलिन, Glasgow=ग्लासगो",
    "es": "Madrid=मैड्रिड, Barcelona=बार्सिलोना, Valencia=वालेंसिया, Toledo=टोलेडो, León=लियोन, Zamora=ज़मोरा, "
          "Córdoba=कोर्डोबा, Sevilla=सेविला, Santiago=सैंटियागो, San Sebastián=सान सेबेस्टियन, Buenos Aires=ब्यूनस आयर्स, Lima=लीमा, "
          "Bogotá=बोगोटा, Mendoza=मेंडोज़ा, Santa Cruz=सांता क्रूज़, Salamanca=सलामांका, Granada=ग्रानाडा, Quito=क्विटो, "
          "Montevideo=मोंटेवीडियो, Bilbao=बिलबाओ",
    "hi": "Delhi=दिल्ली, Mumbai=मुंबई, Kolkata=कोलकाता, Chennai=चेन्नई, Jaipur=जयपुर, Lucknow=लखनऊ, Kanpur=कानपुर, "
          "Nagpur=नागपुर, Patna=पटना, Bhopal=भोपाल, New Delhi=नई दिल्ली, Varanasi=वाराणसी, Agra=आगरा, Indore=इंदौर, "
          "Pune=पुणे, Hyderabad=हैदराबाद, Ujjain=उज्जैन, Meerut=मेरठ, Mount Abu=माउंट आबू, Shimla=शिमला",
    "af": "Kaapstad, Pretoria, Bloemfontein, Stellenbosch, Paarl, Worcester, Kimberley, Upington, George, Durban, "
          "Oos-Londen, Port Elizabeth, Johannesburg, Oudtshoorn, Knysna, Vryburg, Parys, Kruger, Groot Brakrivier, "
          "Windhoek",
    "az": "Bakı, Gəncə, Şəki, Quba, Lənkəran, Naxçıvan, Sumqayıt, Şamaxı, Şuşa, Zaqatala, Mingəçevir, Hacı Zeynalabdin, "
          "Qəbələ, Astara, Yevlax, Qazax, Təbriz, Şirvan, Tiflis, İstanbul",
    "lt": "Vilnius, Kaunas, Klaipėda, Šiauliai, Panevėžys, Alytus, Utena, Palanga, Telšiai, Trakai, Biržai, Jonava, "
          "Naujoji Akmenė, Druskininkai, Mažeikiai, Zarasai, Didžioji Riešė, Marijampolė, Kėdainiai, Ryga",
    "et": "Tallinn, Tartu, Pärnu, Narva, Viljandi, Rakvere, Valga, Võru, Haapsalu, Paide, Rapla, Väike-Maarja, "
          "Kuressaare, Jõgeva, Põlva, Keila, Riia, Helsingi, Elva, Otepää",
    "nl": "Amsterdam, Rotterdam, Utrecht, Den Haag, Breda, Delft, Groningen, Eindhoven, Maastricht, Leiden, Haarlem, "
          "Arnhem, Nijmegen, Zwolle, Antwerpen, Gent, Den Helder, Tilburg, Bergen op Zoom, Deventer",
}
ORGANISATIONS = {
    "en": "Harbour Radio=हार्बर रेडियो, Northern Press=नॉर्दर्न प्रेस, Royal Theatre=रॉयल थिएटर, Union Bank=यूनियन बैंक, "
          "Green Party=ग्रीन पार्टी, Silver Records=सिल्वर रिकॉर्ड्स, Western Railway=वेस्टर्न रेलवे, Morning Post=मॉर्निंग पोस्ट, "
          "Summit Motors=समिट मोटर्स, Labour Alliance=लेबर अलायंस, Atlas Energy=एटलस एनर्जी, United Steel=यूनाइटेड स्टील",
    "es": "Radio Nacional=रेडियो नेशनल, Banco Central=बैंको सेंट्रल, Partido Verde=पार्टीडो वर्डे, Teatro Real=टेआट्रो रियल, "
          "Editorial Aurora=एडिटोरियल ऑरोरा, Diario del Sur=डायारियो डेल सुर, Unión Cívica=यूनियन सिविका, "
          "Discos Sol=डिस्कोस सोल, Línea Azul=लीनिया अज़ुल, Compañía Minera=कंपानिया मिनेरा, Aceros Unidos=अकेरोस यूनिडोस, "
          "Frente Obrero=फ़्रेंते ओब्रेरो",
    "hi": "Rashtriya Bank=राष्ट्रीय बैंक, Jan Morcha=जन मोर्चा, Bharatiya Rail=भारतीय रेल, Lok Dal=लोक दल, Kisan Sabha=किसान सभा, "
          "Sahitya Parishad=साहित्य परिषद, Hind Ispat=हिन्द इस्पात, Samata Party=समता पार्टी, Akash Motors=आकाश मोटर्स, "
          "Kala Kendra=कला केन्द्र, Surya Samachar=सूर्य समाचार, Pragati Manch=प्रगति मंच",
    "af": "Volksbank, Nasionale Party, Radio Karoo, Goue Aar, Kaapse Pers, Boere Unie, Afrikaanse Akademie, Suid Motors, "
          "Rooi Kruis, Protea Uitgewers, Vrye Burger, Wes Myne",
    "az": "Xalq Bankı, Yeni Yol Partiyası, Milli Kitabxana, Dövlət Filarmoniyası, Xəzər Neft, Odlar Yurdu, Elmlər "
          "Akademiyası, Azad Mətbuat, Gənc Tamaşaçılar Teatrı, Araz Radiosu, Vətən Cəbhəsi, Ulduz Motors",
    "lt": "Tautos Bankas, Darbo Partija, Nacionalinis Teatras, Baltijos Radijas, Žalioji Sąjunga, Mokslų Akademija, "
          "Aušros Leidykla, Šiaurės Energija, Rytų Paštas, Liaudies Frontas, Gintaro Kelias, Jaunimo Orkestras",
    "et": "Rahva Pank, Rohelised, Eesti Raudtee, Vanemuise Teater, Põhja Raadio, Teaduste Akadeemia, Koidu Kirjastus, "
          "Balti Energia, Tööliste Liit, Meie Post, Noorte Orkester, Virumaa Leht",
    "nl": "Groene Partij, Noordzee Radio, Nationale Opera, De Morgenpost, Oranje Unie, Zilveren Kruis, Delta Energie, "
          "Koninklijke Bibliotheek, Zuider Spoorwegen, Vrije Pers, Atlas Motors, Rijnvaart",
}
